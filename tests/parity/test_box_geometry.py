"""Golden case box_geometry: how UNITER, LXMERT and VL-BERT turn boxes into numbers."""

import numpy as np
import pytest

from extractors.regions import views
from extractors.regions.selection import overlaps
from tests.parity.golden import check_outputs, golden

# The case says these two in words.
WAVES, RESIZED = (5e-5, 0.0), (1e-3, 0.0)


def _outputs(boxes, size):
    width = size[1]
    height_and_width = np.array([[width, size[0]]] * len(boxes), np.float32)
    seen, info = views.vl_bert_resized(boxes, size)
    stored = views.corners_and_sides(boxes, size)
    in_image = np.concatenate([boxes, height_and_width], 1)
    return {
        "uniter_norm_bb_fp16": stored.astype(np.float16),
        "uniter_7d_from_fp16": views.with_area(stored.astype(np.float16)),
        "uniter_7d": views.with_area(stored),
        "lxmert_4d": views.corners(boxes, size),
        "vlbert_coord_2048": views.position_waves(in_image),
        "vlbert_coord_dim8": views.position_waves(in_image, 8),
        "vlbert_resized_boxes": seen,
        "vlbert_resized_im_info": np.append(info, np.float32(0)),  # the last is the image's number
        "vlbert_flipped_boxes": views.mirrored(seen, info[0]),
        "iou_plus1": overlaps(boxes, inclusive=True),
    }


@pytest.mark.parametrize("case", golden("box_geometry"), ids=str)
def test_geometry_matches_the_originals(case):
    ours = {}
    for i in range(len(case.config["images"])):
        width, height = case.inputs[f"{i}.wh"].tolist()
        found = _outputs(case.inputs[f"{i}.boxes"].numpy(), (height, width))
        ours |= {f"{i}.{name}": value for name, value in found.items()}
    in_words = {name: WAVES for name in ours if "coord" in name}
    in_words |= {name: RESIZED for name in ours if name.endswith(("resized_boxes", "flipped_boxes"))}
    check_outputs(case, ours, tolerance=in_words)
