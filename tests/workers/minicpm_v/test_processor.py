"""Images and prompts of MiniCPM-V as the frontend prepares them, against transformers' processor."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from frontend.chat_template import ChatTemplate
from frontend.media.loader import MediaLoader
from frontend.media.parts import MediaPart
from frontend.media.processors import minicpm_v, processor_of
from frontend.prompts import encode_chat
from shared.config import Settings
from shared.errors import BadModel, InvalidRequest
from tests.support.media_oracle import Prompt, our_logits
from tests.workers.minicpm_v import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

# Small, square, just below and above what is cut, large, and in each direction long.
SIZES = [(3, 5), (32, 32), (33, 32), (31, 33), (45, 46), (61, 20), (150, 77), (40, 100), (301, 299), (300, 2), (5, 160)]
CHANGES = {
    "as it is": {},
    "many slices, another filter, not normalised": {"max_slice_nums": 9, "resample": 2, "do_normalize": False},
    "in one piece": {"slice_mode": False},
    "at most one slice": {"max_slice_nums": 1},
    "four times the tokens": {"downsample_mode": "4x", "scale_resolution": 40},
    "no numbers": {"use_image_id": False, "max_slice_nums": 3},
}


def ours(changes):
    mode = {"downsample_mode": changes["downsample_mode"]} if "downsample_mode" in changes else {}
    return hf.processor(changes, **mode)


@pytest.mark.parametrize("name", CHANGES)
def test_slices_and_pixels_equal_transformers(name):
    made, reference = ours(CHANGES[name]), hf.hf_images(**CHANGES[name])
    grids = set()
    for width, height in SIZES:
        picture = hf.picture(width, height, width)
        wanted = reference([picture], return_tensors="np")
        media = hf.prompt(made, "@", [picture]).media
        assert [part.grid[1:] for part in media] == wanted["target_sizes"].tolist()
        grid = made.grid(height, width)
        assert list(grid) == (wanted["grids"][0] if len(media) > 1 else [1, 1])
        grids.add(grid)
        got = np.concatenate([hf.packed(part) for part in media], axis=-1)
        np.testing.assert_allclose(got, wanted["pixel_values"][0], rtol=0, atol=2e-6)
    assert (len(grids) > 3) == ("one" not in name)


@pytest.mark.parametrize("size", [(150, 77), (20, 21)])
def test_pixels_are_near_those_of_pytorch(size):
    """As transformers resizes where torchvision is installed; the two filters round single values differently."""
    import torch

    picture = hf.picture(*size)
    pixels = hf.processor().image(picture).arrays["pixels"].astype(int)
    source = torch.tensor(np.array(picture)).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(source, pixels.shape[:2], mode="bicubic", antialias=True)
    assert np.abs(pixels - wanted[0].permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("max_slices", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_grids_and_sizes_equal_transformers_for_every_shape(max_slices, mode):
    """With the released settings and others; also where two grids are equally near."""
    released = {"patch_size": 14, "scale_resolution": 448, "max_slice_nums": max_slices, "downsample_mode": mode}
    made = hf.processor(released, {"patch_size": 14}, downsample_mode=mode)
    reference = hf.hf_images(**released)
    sizes = [(h, w) for h in range(5, 4000, 237) for w in range(5, 4000, 251)]
    sizes += [(1000 * a, 1000 * b) for a in range(1, 12) for b in range(1, 12)] + [(448, 448), (448, 449), (896, 448)]
    for height, width in sizes:
        grid = reference.get_sliced_grid((height, width), max_slices, 448)
        assert made.grid(height, width) == tuple(grid or (1, 1))
        whole = reference.find_best_resize((height, width), 448, 14, mode, allow_upscale=grid is None)
        assert made.fitting_size(height, width) == whole
        if grid is not None:
            refined = reference.get_refine_size((height, width), grid, 448, 14, mode, allow_upscale=True)
            slices = made.slice_size(height, width, *grid)
            assert (slices[0] * grid[0], slices[1] * grid[1]) == refined


# As the released template writes contents: parts on lines of their own.
TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{- '<|image_pad|>' if part.type == 'image' else part.text }}{{ '' if loop.last else '\n' }}"
    "{%- endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
CONVERSATION = [
    {"role": "system", "content": ["Be short."]},
    {"role": "user", "content": [(77, 301), "and this", (16, 16), (150, 77)]},
    {"role": "assistant", "content": ["A cat.\n"]},
    {"role": "user", "content": ["\n", (30, 30), "?"]},
]


@pytest.mark.parametrize("name", CHANGES)
def test_prompts_equal_those_of_transformers(transformers, name):
    """The same messages give the same tokens: numbers of images, markers, the line breaks between rows of slices."""
    made, reference = ours(CHANGES[name]), hf.hf_processor(transformers, **CHANGES[name])
    pictures = [hf.picture(*part) for m in CONVERSATION for part in m["content"] if not isinstance(part, str)]
    given = iter(pictures)
    shown = [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": next(given)}
                for part in message["content"]
            ],
        }
        for message in CONVERSATION
    ]
    wanted = reference.apply_chat_template(shown, TEMPLATE, tokenize=True, return_dict=True, return_tensors="pt")
    asked = hf.prompt(made, ChatTemplate(TEMPLATE, {}).render(shown), pictures)
    assert asked.tokens == wanted["input_ids"][0].tolist()
    assert [part.grid[1:] for part in asked.media] == wanted["target_sizes"].tolist()
    placed = [i for part in asked.media for i in range(part.start, part.start + part.num_tokens)]
    assert placed == [i for i, token in enumerate(asked.tokens) if token == hf.IMAGE]
    text = hf.TOKENIZER.decode(asked.tokens, skip_special_tokens=False)
    assert ("<image_id>3</image_id><image>" in text) == (name != "no numbers")
    assert ("</slice>\n<slice>" in text) == ("one" not in name)


class Service:
    """What of the frontend's service a conversation with images needs."""

    def __init__(self, processor):
        self.media = MediaLoader(processor, Settings())

    async def encode(self, text, **_):
        return hf.TOKENIZER.encode(text, add_special_tokens=False).ids


def test_a_request_gives_the_logits_of_transformers_on_its_own_pixels(transformers, tmp_path):
    """The whole way: files, pictures, prompt, encoder and decoder, each side with its own processor."""
    import torch

    reference, model = hf.make(transformers, tmp_path)
    pictures, text = [hf.picture(24, 24), hf.picture(61, 44)], "a<|image_pad|>b<|image_pad|>?"
    inputs = hf.hf_processor(transformers)(images=pictures, text=[text], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "pixel_values", "target_sizes")}
    with torch.no_grad():
        wanted = reference(**inputs, use_cache=False).logits[0].numpy()
    parts = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        parts.append(MediaPart("image", "messages[0]", data=base64.b64encode(stream.getvalue()).decode()))
    asked = Prompt(*asyncio.run(encode_chat(Service(hf.processor()), text, parts, salt="")))
    assert len(asked.media) > 4
    np.testing.assert_allclose(our_logits(model, asked), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(20_000, 20), (5, 1_001), (64_000_000, 1)])
def test_pictures_too_long_for_the_model_are_refused_before_they_are_resized(size):
    class Head:
        width, height = size

    with pytest.raises(InvalidRequest, match=f"{size[0]} x {size[1]} pixels; this model takes ratios up to 200"):
        hf.processor().tiles(Head())


def test_the_longest_picture_has_a_bounded_number_of_tokens():
    made = hf.processor({"patch_size": 14, "scale_resolution": 448, "max_slice_nums": 9}, {"patch_size": 14})
    parts = made.tiles(Image.new("RGB", (8_000, 40)))
    assert [part.num_tokens for part in parts] == [111] + [64] * 3


def test_videos_are_refused_with_a_reason():
    made = hf.processor()
    assert made.modalities == ("image",)
    with pytest.raises(InvalidRequest, match="video input is not supported for this model"):
        made.video(b"", "messages[0]")


@pytest.mark.parametrize("text", ["a", "@@", ""])
def test_a_prompt_that_does_not_name_each_picture_once_is_refused(text):
    with pytest.raises(InvalidRequest, match="placeholders for 1 images"):
        hf.prompt(hf.processor(), text, [hf.picture(150, 77)])


CONFIG = {
    "model_type": "minicpmv4_6", "image_token_id": hf.IMAGE, "vision_config": {"patch_size": 14, "image_size": 980},
}  # fmt: skip
SECTION = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "downsample_mode": "16x", "max_slice_nums": 5,
    "image_processor_type": "MiniCPMV4_6ImageProcessor", "patch_size": 14, "resample": 3, "slice_mode": True,
    "rescale_factor": 0.00392156862745098, "scale_resolution": 336, "use_image_id": False, "image_mean": [0.4] * 3,
}  # fmt: skip


def read(tmp_path, config=CONFIG, token_id=hf.TOKENIZER.token_to_id, **files):
    for name, content in {"config": config, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return processor_of(tmp_path, token_id)


def test_settings_are_found_where_checkpoints_have_them(tmp_path):
    released = read(tmp_path)
    assert released == minicpm_v.MiniCpmVProcessor(image_token_id=hf.IMAGE)
    wanted = minicpm_v.MiniCpmVProcessor(
        image_token_id=hf.IMAGE, edge=336, max_slices=5, has_numbers=False, mean=(0.4,) * 3
    )
    other = {"scale_resolution": 1}
    (tmp_path / "sections").mkdir()
    assert (
        read(tmp_path / "sections", processor_config={"image_processor": SECTION, "video_processor": other}) == wanted
    )
    assert read(tmp_path, preprocessor_config=SECTION) == wanted


def test_a_text_only_conversion_takes_no_pictures(tmp_path):
    assert read(tmp_path, {"model_type": "minicpmv4_6", "text_config": {}}) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch_size": 16}, "not the model's"), ({"downsample_mode": "4x"}, "the model's is 16x"),
        ({"do_resize": False}, "do_resize False"), ({"do_rescale": False}, "do_rescale False"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"), ({"image_std": [0.5]}, "1 channels"),
        ({"scale_resolution": 0}, "scale_resolution 0"), ({"max_slice_nums": "many"}, "malformed"),
    ],
)  # fmt: skip
def test_settings_that_are_not_computed_are_refused(tmp_path, changes, reason):
    with pytest.raises(BadModel, match=reason):
        read(tmp_path, preprocessor_config=SECTION | changes)


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    with pytest.raises(BadModel, match="image token 5 of the model"):
        read(tmp_path, CONFIG | {"image_token_id": 5})
    with pytest.raises(BadModel, match="no token <slice>"):
        read(tmp_path, token_id={**hf.TOKENIZER.get_vocab(), "<slice>": None}.get)
