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


def merged(patches, grid, size, pooling):
    """(rows * columns, 3 * size**2) by rows -> as many blocks of pooling x pooling patches, pixel by pixel."""
    rows, columns = grid
    side = size * pooling
    blocks = np.zeros((rows * columns // pooling**2, side, side, 3), np.float32)
    for i, patch in enumerate(patches):
        (block_row, row), (block_column, column) = divmod(i // columns, pooling), divmod(i % columns, pooling)
        block = blocks[block_row * (columns // pooling) + block_column]
        block[row * size : (row + 1) * size, column * size : (column + 1) * size] = patch.reshape(size, size, 3)
    return blocks.reshape(len(blocks), -1)


@pytest.mark.oracle
@pytest.mark.mlx
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gemma4_unified_patches_are_those_of_gemma4_merged(size):
    """transformers has its processor with torchvision only; resizing is Gemma 4's, which it has with Pillow."""
    import mlx.core as mx

    from workers.models.gemma.vision import cut_patches

    module = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    theirs = module.Gemma4ImageProcessorPil()(picture(size), return_tensors="np")
    processed = from_configs({"model_type": "gemma4_unified", "vision_config": {}}, {}).image(picture(size))
    _, rows, columns = processed.grid
    pixels = mx.array(processed.arrays["pixels"]).astype(mx.float32) * (1 / 255)
    patches, grid = cut_patches(pixels, 48)
    assert grid == (rows // 3, columns // 3)
    assert processed.num_tokens == len(patches) == theirs["num_soft_tokens_per_image"][0]
    expected = merged(theirs["pixel_values"][0][: rows * columns], (rows, columns), 16, 3)
    np.testing.assert_allclose(np.array(patches), expected, rtol=0, atol=1e-6)


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


SIGLIP = {
    "as released": {"do_normalize": False, "resample": 2},
    "defaults": {},
    "other": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2},
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", SIGLIP)
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_gemma3n_pixels_equal_transformers(size, case):
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    settings = {"size": {"height": 256, "width": 256}, **SIGLIP[case]}
    expected = module.SiglipImageProcessorPil(**settings)(picture(size), return_tensors="np")["pixel_values"][0]
    config = {"model_type": "gemma3n", "vision_config": {}}
    processed = from_configs(config, {"image_processor": settings}).image(picture(size))
    assert processed.num_tokens == 256
    pixels, mean, std = (processed.arrays[name] for name in ("pixels", "mean", "std"))
    np.testing.assert_allclose(((pixels / 255 - mean) / std).transpose(2, 0, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"size": {"height": 700, "width": 700}}, "256 tokens"),
        ({"size": {"height": 768, "width": 512}}, "256 tokens"),
        ({"do_rescale": False}, "not rescaled"),
        ({"do_resize": False}, "not resized"),
    ],
)
def test_gemma3n_images_that_are_not_prepared_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        from_configs({"model_type": "gemma3n", "vision_config": {}}, settings)


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


def test_settings_that_the_encoder_has_no_positions_for_are_refused():
    settings = {"image_processor": {"max_soft_tokens": 280}}
    for model_type, name, count in (
        ("gemma4", "position_embedding_size", 839),
        ("gemma4_unified", "mm_posemb_size", 279),
    ):
        with pytest.raises(ValueError, match=f"the encoder has {count}"):
            from_configs({"model_type": model_type, "vision_config": {name: count}}, settings)
        from_configs({"model_type": model_type, "vision_config": {name: count + 1}}, settings)


def test_gemma3_opens_an_image_and_sets_it_apart():
    made = from_configs({"model_type": "gemma3", "vision_config": {}, "boi_token_index": 3, "eoi_token_index": 4}, {})
    assert made.placeholders == {"image": 3}
    assert made.expansion("image", 2) == ([3, 262_144, 262_144, 4], 1)
    assert made.rewrite("a<start_of_image>b") == "a\n\n<start_of_image>\n\nb"
