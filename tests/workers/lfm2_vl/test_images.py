"""The frontend's images and prompts against transformers' processor: pixels, tiles, token ids; and the whole way."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from frontend.media.loader import MediaLoader
from frontend.media.parts import MediaPart
from frontend.media.processors import processor_of
from frontend.prompts import encode_chat
from shared.config import Settings
from shared.errors import BadModel, InvalidRequest
from tests.support.media_oracle import Prompt, our_logits
from tests.workers.lfm2_vl import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

# Small, square, in each direction just below and above what comes in tiles, large, and as long as can be.
SIZES = [
    (3, 5),
    (24, 24),
    (40, 24),
    (33, 31),
    (32, 33),
    (61, 20),
    (45, 41),
    (150, 77),
    (40, 100),
    (301, 299),
    (8, 64),
    (500, 51),
]
CHANGES = {
    "as it is": {},
    "no thumbnail, few tiles, another filter": {"use_thumbnail": False, "min_tiles": 3, "max_tiles": 6, "resample": 3},
    "in one piece": {"do_image_splitting": False},
    "many tokens, larger tiles": {"max_image_tokens": 20, "tile_size": 24, "max_pixels_tolerance": 1.0},
    "no markers": {"use_image_special_tokens": False},
}


def picture(width, height):
    """With large and small structures, so that a filter shows."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin(x * y / 90)], axis=-1) * 90
    noise = np.random.default_rng(width).integers(-30, 30, (height, width, 3))
    return Image.fromarray((128 + waves + noise).clip(0, 255).astype(np.uint8))


def ours(tmp_path, changes):
    """The frontend's processor, made from the files of a checkpoint."""
    config = {"model_type": "lfm2_vl", "vision_config": hf.VISION, "image_token_id": hf.IMAGE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hf.SIZES | changes))
    return processor_of(tmp_path)


def theirs(transformers, changes):
    return hf.image_processor(transformers, **(hf.SIZES | changes))


def patches_of(part):
    """(n, size * size * 3) as the reference's rows have them, from what is sent."""
    pixels = (part.arrays["pixels"].astype(np.float32) / 255 - part.arrays["mean"]) / part.arrays["std"]
    _, rows, columns = part.grid
    cut = pixels.reshape(rows, hf.PATCH, columns, hf.PATCH, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(rows * columns, -1)


@pytest.mark.parametrize("name", [n for n in CHANGES if n != "no markers"])
def test_tiles_and_pixels_equal_transformers(transformers, tmp_path, name):
    mine, reference = ours(tmp_path, CHANGES[name]), theirs(transformers, CHANGES[name])
    grids = set()
    for width, height in SIZES:
        image = picture(width, height)
        parts = mine.tiles(image)
        wanted = reference([image], return_tensors="pt", return_row_col_info=True)
        assert [part.grid[1:] for part in parts] == wanted["spatial_shapes"].tolist()
        grid = mine.grid(height, width)
        assert grid == (wanted["image_cols"][0], wanted["image_rows"][0])
        grids.add(grid)
        for part, values, mask in zip(parts, wanted["pixel_values"], wanted["pixel_attention_mask"], strict=True):
            expected = values[mask.bool()].numpy()
            step = np.tile(1 / 255 / part.arrays["std"], hf.PATCH**2)
            assert (np.abs(patches_of(part) - expected) <= 1.01 * step).all()
    assert (len(grids) > 3) == (name != "in one piece")


@pytest.mark.parametrize("tiles", [(2, 10), (2, 2), (1, 4), (3, 6)])
def test_grids_of_tiles_equal_transformers_for_every_shape(transformers, tiles):
    """With the released settings and others; also where two grids are equally near."""
    least, most = tiles
    mine, reference = hf.Lfm2VlProcessor(min_tiles=least, max_tiles=most), hf.image_processor(transformers)
    sizes = [(h, w) for h in range(300, 4000, 97) for w in range(300, 4000, 101)]
    sizes += [(1000 * a, 1000 * b) for a in range(1, 14) for b in range(1, 14)]
    sizes += (
        [(1200 * a // 8, 1200) for a in range(1, 60)] + [(1200, 1500)] + [(1200, 1200 * a // 8) for a in range(1, 60)]
    )
    for height, width in sizes:
        resized = reference.smart_resize(height, width, 2, 64, 256, 16)
        assert mine.fitting_size(height, width) == (resized[1], resized[0])
        is_large = reference._is_image_too_large(height, width, 256, 16, 2, 2.0)
        wanted = reference._get_grid_layout(height, width, least, most, 512)[:2] if is_large else (1, 1)
        assert mine.grid(height, width) == wanted


@pytest.fixture(scope="module")
def tokenizer(transformers, tmp_path_factory):
    """Every byte is a token, beside LFM2-VL's special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>", "<|im_end|>"]
    special += [f"<|img_row_{r}_col_{c}|>" for r in range(1, 11) for c in range(1, 11)]
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|im_end|>")


class Service:
    """What of the frontend's service a conversation with images needs."""

    def __init__(self, processor, tokenizer):
        self.media, self._tokenizer = MediaLoader(processor, Settings()), tokenizer

    async def encode(self, text, **_):
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def prepared(processor, tokenizer, text, images):
    """Token ids and items of a rendered conversation, as the frontend makes them of a request."""
    parts = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        parts.append(MediaPart("image", "messages[0]", data=base64.b64encode(stream.getvalue()).decode()))
    return asyncio.run(encode_chat(Service(processor, tokenizer), text, parts, salt=""))


TEXT = "<|im_start|>user\n<image>What is\n<image> this?<image><|im_end|>\n<|im_start|>assistant\n"
PICTURES = [(24, 24), (150, 77), (40, 100)]  # one piece and two that come in tiles


@pytest.mark.parametrize("name", CHANGES)
def test_prompts_equal_those_of_transformers_processor(transformers, tmp_path, tokenizer, name):
    mine = ours(tmp_path, CHANGES[name] | {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")})
    settings = {n: value for n, value in CHANGES[name].items() if n != "use_image_special_tokens"}
    reference = full_processor(transformers, theirs(transformers, settings), tokenizer)
    images = [picture(*size) for size in PICTURES]
    wanted = reference(
        images=images, text=TEXT, return_tensors="pt", use_image_special_tokens=name != "no markers",
    )  # fmt: skip
    tokens, media = prepared(mine, tokenizer, TEXT, images)
    assert tokens == wanted["input_ids"][0].tolist()
    assert [part.grid[1:] for part in media] == wanted["spatial_shapes"].tolist()
    token = mine.image_token_id
    placed = [i for part in media for i in range(part.start, part.start + part.num_tokens)]
    assert placed == [i for i, t in enumerate(tokens) if t == token]
    if name == "as it is":
        text = tokenizer.decode(tokens)
        assert "<|image_end|>What" in text and "<image><|img_row_1_col_2|><image>" in text
        assert text.count("<|img_thumbnail|>") == 2 and text.count("<|image_start|>") == 3


def full_processor(transformers, image_processor, tokenizer):
    """`Lfm2VlProcessor` without the check of its parts' classes, which asks for torchvision."""
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    class Unchecked(Lfm2VlProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    return Unchecked(image_processor, tokenizer)


def test_a_request_gives_the_logits_of_transformers_on_its_own_pixels(transformers, tmp_path, tokenizer):
    """The whole way: pictures, prompt, encoder and decoder, each side with its own processor."""
    import torch

    token, vocab_size = tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer)
    reference, model = hf.make(transformers, tmp_path, {"vocab_size": vocab_size}, image_token_id=token)
    mine = ours(tmp_path, {"image_token_id": token})
    images = [picture(*size) for size in ((24, 24), (61, 44))]
    text = "<|im_start|>user\n<image>a<image>?<|im_end|>"
    inputs = full_processor(transformers, theirs(transformers, {}), tokenizer)(
        images=images, text=text, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = reference(**inputs, use_cache=False).logits[0].numpy()
    made = Prompt(*prepared(mine, tokenizer, text, images))
    assert len(made.media) > 5
    got = our_logits(model, made)
    # The two filters round single values of 255 differently.
    assert np.abs(got - wanted).max() < 0.01 * np.abs(wanted).max()
    exact = hf.hf_logits(reference, made)
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-4)


def test_pictures_too_long_for_the_model_are_refused_before_they_are_resized():
    """transformers' processor makes more patches of them than it has room for, and fails."""
    mine = hf.Lfm2VlProcessor()
    with pytest.raises(InvalidRequest, match=r"20000 x 20 pixels, which is too long"):
        mine.tiles(Image.new("RGB", (20_000, 20)))
    parts = mine.tiles(Image.new("RGB", (8_000, 32)))
    assert [part.grid for part in parts] == [[1, 2, 500]]


@pytest.mark.parametrize("text", ["a", "<image><image>", ""])
def test_a_prompt_that_does_not_name_each_picture_once_is_refused(text):
    mine = hf.processor()
    leads = [[part.lead for part in mine.tiles(picture(150, 77))]]
    assert len(leads[0]) > 2
    with pytest.raises(InvalidRequest, match="placeholders for 1 images"):
        mine.rewrite(text, leads)


FIRST_RELEASE = {  # the tiles' settings lie in processor_config.json, the filter's in preprocessor_config.json
    "config.json": {
        "model_type": "lfm2-vl", "image_token_index": 396, "use_thumbnail": True, "downsample_factor": 2,
        "vision_config": {"patch_size": 16},
    },
    "processor_config.json": {
        "do_image_splitting": True, "downsample_factor": 2, "encoder_patch_size": 16, "max_image_tokens": 200,
        "max_pixels_tolerance": 1.5, "max_tiles": 8, "min_image_tokens": 32, "min_tiles": 3, "tile_size": 256,
        "use_image_special_tokens": False, "use_thumbnail": False,
    },
    "preprocessor_config.json": {
        "do_resize": False, "image_processor_type": "Siglip2ImageProcessor", "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 1 / 255, "patch_size": 16,
    },
}  # fmt: skip
LATER = {
    "config.json": {"model_type": "lfm2_vl", "image_token_id": 397, "vision_config": {"patch_size": 16}},
    "processor_config.json": {
        "image_processor": {"max_tiles": 8, "tile_size": 256, "use_thumbnail": False, "max_image_tokens": 200},
        "use_image_special_tokens": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("files", [FIRST_RELEASE, LATER], ids=["first release", "later"])
def test_settings_are_found_where_checkpoints_have_them(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = processor_of(tmp_path)
    assert (found.max_tiles, found.tile_size, found.max_tokens, found.has_thumbnail) == (8, 256, 200, False)
    assert not found.has_markers
    if files is LATER:
        assert (found.min_tiles, found.tolerance, found.mean, found.image_token_id) == (2, 2.0, (0.5,) * 3, 397)
    else:
        assert (found.min_tiles, found.tolerance, found.mean) == (3, 1.5, (0.4, 0.5, 0.6))
        assert (found.min_tokens, found.image_token_id) == (32, 396)


def test_a_text_only_conversion_takes_no_pictures(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lfm2-vl", "text_config": {}}))
    assert processor_of(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder_patch_size": 14}, "not the model's"), ({"downsample_factor": 3}, "not the model's"),
        ({"min_tiles": 11}, "is empty"), ({"min_image_tokens": 9}, "is empty"), ({"tile_size": 20}, "tile_size 20"),
        ({"resample": 1}, "LANCZOS"), ({"do_rescale": False}, "not scaled"), ({"rescale_factor": 1.0}, "not scaled"),
        ({"max_tiles": "many"}, "malformed"),
    ],
)  # fmt: skip
def test_settings_that_are_not_computed_are_refused(tmp_path, changes, reason):
    with pytest.raises(BadModel, match=reason):
        ours(tmp_path, changes)
