"""Gemma's images against transformers' processors with Pillow, up to what the encoder gets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from frontend.media.gemma_images import SOFT_TOKEN_BUDGETS, Gemma3Images, Gemma4Images
from frontend.media.processors.gemma import from_configs

SIZES = [(640, 480), (48, 48), (37, 1100), (1024, 33), (900, 901)]


def picture(size, mode="RGB"):
    array = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


@pytest.mark.oracle
@pytest.mark.mlx
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("budget", SOFT_TOKEN_BUDGETS[:3])
def test_gemma4_patches_equal_transformers(size, budget):
    import mlx.core as mx

    from workers.models.gemma.vision import cut_patches

    module = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    expected = module.Gemma4ImageProcessorPil(max_soft_tokens=budget)(picture(size), return_tensors="np")
    config = {"model_type": "gemma4", "vision_config": {}}
    processed = from_configs(config, {"image_processor": {"max_soft_tokens": budget}}).image(picture(size))
    _, rows, columns = processed.grid
    count = rows * columns
    positions = expected["image_position_ids"][0]
    assert (positions != -1).all(axis=-1).sum() == count
    assert positions[count - 1].tolist() == [columns - 1, rows - 1]
    assert processed.num_tokens == expected["num_soft_tokens_per_image"][0]
    pixels = mx.array(processed.arrays["pixels"]).astype(mx.float32) * (1 / 255)
    patches, grid = cut_patches(pixels, 16)
    assert grid == (rows, columns)
    np.testing.assert_allclose(np.array(patches), expected["pixel_values"][0][:count], rtol=0, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gemma3_pixels_equal_transformers(size):
    module = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = module.Gemma3ImageProcessorPil(size={"height": 224, "width": 224})
    expected = processor(picture(size), return_tensors="np")["pixel_values"][0]
    config = {"model_type": "gemma3", "vision_config": {"image_size": 224}, "mm_tokens_per_image": 64}
    processed = from_configs(config, {}).image(picture(size))
    assert processed.num_tokens == 64
    pixels = (processed.arrays["pixels"].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode):
    pixels = Gemma4Images(max_soft_tokens=70).resized(picture((60, 60), mode))
    assert pixels.shape == (384, 384, 3)
    assert Gemma3Images(32).resized(picture((60, 60), mode)).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(1, 10**8), (10**8, 1), (1, 1), (3, 10**5)], ids=str)
def test_any_shape_stays_within_the_budget(size):
    height, width = Gemma4Images().target_size(*size)
    assert height % 48 == 0 == width % 48
    assert 0 < height * width <= 280 * 48**2


def test_what_the_model_takes_and_how_the_prompt_frames_it():
    config = {"model_type": "gemma4", "vision_config": {}, "audio_config": {}, "boi_token_id": 7, "eoa_token_index": 9}
    made = from_configs(config, {})
    assert made.modalities == ("image", "audio")
    assert made.placeholders == {"image": 258_880, "audio": 258_881}
    assert made.expansion("image", 2) == ([7, 258_880, 258_880, 258_882], 1)
    assert made.expansion("audio", 1) == ([256_000, 258_881, 9], 1)
    assert made.rewrite("a<|image|>b") == "a<|image|>b"
    assert from_configs({"model_type": "gemma4", "vision_config": {}}, {}).modalities == ("image",)


def test_gemma3_opens_an_image_and_sets_it_apart():
    made = from_configs({"model_type": "gemma3", "vision_config": {}, "boi_token_index": 3, "eoi_token_index": 4}, {})
    assert made.placeholders == {"image": 3}
    assert made.expansion("image", 2) == ([3, 262_144, 262_144, 4], 1)
    assert made.rewrite("a<start_of_image>b") == "a\n\n<start_of_image>\n\nb"
