"""Gemma's images against transformers' processors with Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from frontend.media.gemma_images import SOFT_TOKEN_BUDGETS, Gemma3Images, Gemma4Images

SIZES = [(640, 480), (48, 48), (37, 1100), (1024, 33), (900, 901)]


def picture(size, mode="RGB"):
    array = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("budget", SOFT_TOKEN_BUDGETS[:3])
def test_gemma4_patches_equal_transformers(size, budget):
    module = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    expected = module.Gemma4ImageProcessorPil(max_soft_tokens=budget)(picture(size), return_tensors="np")
    ours = Gemma4Images(max_soft_tokens=budget)
    patches, (rows, columns) = ours(picture(size))
    count = rows * columns
    positions = expected["image_position_ids"][0]
    assert (positions != -1).all(axis=-1).sum() == count
    assert positions[count - 1].tolist() == [columns - 1, rows - 1]
    assert ours.num_tokens((rows, columns)) == expected["num_soft_tokens_per_image"][0]
    np.testing.assert_allclose(patches, expected["pixel_values"][0][:count], rtol=0, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gemma3_pixels_equal_transformers(size):
    module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = module.Gemma3ImageProcessorPil(size={"height": 224, "width": 224})
    expected = processor(picture(size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(Gemma3Images(224)(picture(size)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode):
    patches, grid = Gemma4Images(max_soft_tokens=70)(picture((60, 60), mode))
    assert patches.shape == (grid[0] * grid[1], 768)
    assert Gemma3Images(32)(picture((60, 60), mode)).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(1, 10**8), (10**8, 1), (1, 1), (3, 10**5)], ids=str)
def test_any_shape_stays_within_the_budget(size):
    height, width = Gemma4Images().target_size(*size)
    assert height % 48 == 0 == width % 48
    assert 0 < height * width <= 280 * 48**2
