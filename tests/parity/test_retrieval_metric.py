"""Recall at k, against ALBEF's and ViLT's own evaluation."""

import numpy as np
import pytest

from downstream.recall import Recall, matrix_recall
from tests.parity.golden import check_outputs, golden

# ALBEF sorts with numpy's default sort, which is not stable; recorded with its AVX2 / AVX-512 form.
SIMD_SORT = {"AVX2", "X86_V3"} & set(np.show_config("dicts")["SIMD Extensions"]["found"])
NOT_HERE = "on this CPU numpy orders equal scores otherwise, and so would the original"


def albef_names(recall: Recall) -> dict[str, float]:
    tr, ir = recall.image_to_text, recall.text_to_image
    named = {f"txt_r{k}": v for k, v in tr.items()} | {f"img_r{k}": v for k, v in ir.items()}
    means = {"txt_r_mean": sum(tr.values()) / len(tr), "img_r_mean": sum(ir.values()) / len(ir)}
    return named | means | {"r_mean": recall.mean}


@pytest.mark.parametrize("case", golden("retrieval_eval"), ids=str)
def test_retrieval_eval(case):
    text_image = np.array(case.inputs["txt2img"])
    for image, texts in case.inputs["img2txt"].items():
        assert np.flatnonzero(text_image == int(image)).tolist() == sorted(texts)
    left_out = {} if SIMD_SORT else {"reranked": NOT_HERE, "tied": NOT_HERE}
    got = {}
    for name in set(case.outputs) - set(left_out):
        scores = case.inputs[name]
        i2t, t2i = np.array(scores["score_i2t"]), np.array(scores["score_t2i"])
        # Flag: ALBEF's order of ties. The scores of `reranked` and `tied` have many.
        got[name] = {"albef": albef_names(matrix_recall(i2t, text_image, t2i, ties="albef"))}
        if "vilt" in case.outputs[name]:
            # No flag: `dense` has no ties. ViLT counts in fractions, in float32, on the one matrix.
            recall = matrix_recall(i2t, text_image)
            both = [*recall.text_to_image.values(), *recall.image_to_text.values()]
            got[name]["vilt"] = [float(np.float32(value / 100)) for value in both]
    check_outputs(case, got, left_out=left_out)
