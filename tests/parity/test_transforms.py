"""ViLT's image transform and augmentation, against its own code."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from shards.transforms import HALF_MEAN, HALF_STD, normalise, normalise_array, resize_vilt, vilt_size
from tests.parity.golden import check_outputs, golden
from training.augment import OPERATIONS

CASES = golden("vilt_transforms")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vilt_transforms(case):
    got = {}
    for i in range(len(case.config["sizes"])):
        image = case.inputs[f"pixels{i}"].numpy()
        got[f"resized{i}"] = resize_vilt(image, case.config["short"])
        small = resize_vilt(image, case.config["pixelbert_size"])
        chw = torch.from_numpy(small).permute(2, 0, 1)
        got[f"pixelbert{i}"] = normalise(chw[None], HALF_MEAN, HALF_STD)[0]
        numpy_form = normalise_array(small, HALF_MEAN, HALF_STD).transpose(2, 0, 1)
        np.testing.assert_allclose(numpy_form, case.outputs[f"pixelbert{i}"], atol=case.tolerance[0], rtol=0)
    table = case.outputs["size_table"].tolist()
    got["size_table"] = [[w, h, *vilt_size(w, h, 384), *vilt_size(w, h, 800)] for w, h, *_ in table]
    check_outputs(case, {k: torch.as_tensor(v) for k, v in got.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_recorded_files_are_the_recorded_pixels(case):
    for i in range(len(case.config["sizes"])):
        png = Image.open(io.BytesIO(case.inputs[f"png{i}"].numpy().tobytes()))
        assert np.array_equal(np.array(png), case.inputs[f"pixels{i}"].numpy())


@pytest.mark.parametrize("case", golden("randaug_vilt"), ids=str)
def test_randaug_vilt(case):
    image = Image.fromarray(case.inputs["pixels"].numpy())
    got = {}
    for name, operation in OPERATIONS.items():
        value = operation.value(case.config["m"])
        got[f"value.{name}"] = torch.tensor(value, dtype=torch.float64)
        got[f"{name}.pos"] = np.array(operation.apply(image, value))
        if operation.signed:
            got[f"{name}.neg"] = np.array(operation.apply(image, -value))
    # The case's tolerance of 1 is meant for pixels of another Pillow; a strength is exact to rounding.
    exact = {name: (1e-12, 0.0) for name in got if name.startswith("value.")}
    check_outputs(case, got, tolerance=exact)
