"""What the frontend makes of images, against transformers' processor: pixels, sizes and tokens; and from end to end."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
import sys

import numpy as np
import pytest

import tandem
from frontend.media.loader import MediaLoader
from frontend.media.parts import MediaPart
from frontend.media.processors import pixtral, processor_of
from frontend.tokenizer import encode
from shared.config import Settings
from shared.errors import BadModel, InvalidRequest
from tests.support import tiny_model
from tests.support.media_oracle import arrays_of
from tests.workers.mistral3 import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

NAMES = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
TEMPLATE = (
    "{% for m in messages %}[INST]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}[IMG]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}[/INST]{% endfor %}"
)
SETTINGS = {
    "mistral3": {"patch_size": 4, "spatial_merge_size": 2},
    "llava": {"patch_size": 4},
}
SIZES = [(45, 21), (8, 8), (1, 1), (200, 7), (7, 200), (48, 48), (49, 47), (333, 1000), (31, 96)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model._tokenizer(NAMES)


@pytest.fixture
def reference(transformers, tokenizer, monkeypatch):
    """transformers' processor with its Pillow backend; its module asks for torchvision's, which gives other pixels."""
    pillow = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    monkeypatch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", pillow)
    processing = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|end|>")

    def make(model_type, **image):
        images = pillow.PixtralImageProcessorPil(**{"size": {"longest_edge": 48}, **image})
        return processing.PixtralProcessor(images, fast, **SETTINGS[model_type])

    return make


def ours(tokenizer, model_type, **settings):
    config = {"model_type": model_type, "vision_config": hf.VISION, "text_config": hf.TEXT}
    return pixtral.from_configs(config, {**SETTINGS[model_type], **settings}, tokenizer.token_to_id)


@pytest.mark.parametrize("model_type", SETTINGS)
@pytest.mark.parametrize("image", [
    {}, {"size": {"longest_edge": 100}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2},
    {"size": {"height": 40, "width": 64}},
], ids=["defaults", "other settings", "height and width"])  # fmt: skip
def test_pixels_and_tokens_equal_transformers(reference, tokenizer, model_type, image):
    theirs, made = reference(model_type, **image), ours(tokenizer, model_type, image_processor=image)
    pictures = [hf.picture(*size, seed) for seed, size in enumerate(SIZES) if min(size) / max(size) > 0.025]
    text = "".join(f"[INST]a{i}[IMG]" for i in range(len(pictures))) + "[IMG_END] b[/INST]"
    whole = theirs(text=text, images=pictures, return_tensors="np")
    processed = [made.image(picture) for picture in pictures]
    for one, pixels, size in zip(processed, whole["pixel_values"], whole["image_sizes"], strict=True):
        assert one.arrays["pixels"].shape[:2] == tuple(size)
        got = (one.arrays["pixels"] / np.float32(255) - one.arrays["mean"]) / one.arrays["std"]
        np.testing.assert_allclose(got.transpose(2, 0, 1), pixels[:, : size[0], : size[1]], rtol=0, atol=1e-5)
    tokens, media = placed(made, tokenizer, text, pictures)
    assert tokens == whole["input_ids"][0].tolist()
    # The rows of a model replace the embeddings of [IMG], in the order they come in.
    inside = [t for m in media for t in tokens[m.start : m.start + m.num_tokens]]
    assert inside.count(tokenizer.token_to_id("[IMG]")) == tokens.count(tokenizer.token_to_id("[IMG]"))
    assert all(tokens[m.start + m.num_tokens] == tokenizer.token_to_id("[IMG_END]") for m in media)


def placed(made, tokenizer, text, pictures):
    """Through the frontend's loader."""
    parts = []
    for i, picture in enumerate(pictures):
        file = io.BytesIO()
        picture.save(file, "PNG")
        parts.append(MediaPart(kind="image", param=f"p{i}", data=base64.b64encode(file.getvalue()).decode()))
    loader = MediaLoader(made, Settings())
    loaded = asyncio.run(loader.load(parts))
    return loader.place(encode(tokenizer, loader.rewrite(text, loaded), add_special_tokens=False), loaded)


def test_what_is_sent_is_what_the_encoder_takes(transformers, tokenizer, tmp_path):
    _, model = hf.make(transformers, tmp_path, "mistral3")
    made = hf.processor(tmp_path)
    for size in SIZES[:4]:
        media = hf.item(made, *size)
        rows = model.encode_media(arrays_of(media), media.grid, "image")
        assert rows.shape == (1, media.num_tokens, 32)
    assert made.image(hf.picture(8, 8)).num_tokens == 1, "one token and the one that ends the image"


def test_an_image_of_which_nothing_would_be_left_is_refused(tokenizer):
    made = ours(tokenizer, "mistral3")
    for size in ((49, 1), (1, 10_000)):
        with pytest.raises(InvalidRequest, match="too narrow"):
            made.image(hf.picture(*size))
    assert made.image(hf.picture(48, 1)).grid == [1, 2, 12]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_resize": False}, "do_resize"), ({"do_normalize": False}, "do_normalize"),
        ({"do_rescale": False}, "do_rescale"), ({"do_center_crop": True}, "do_center_crop"),
        ({"rescale_factor": 1.0}, "rescale_factor"), ({"size": {"longest_edge": -1}}, "size"),
        ({"size": {"shortest_edge": 5}}, "height"), ({"resample": 77}, "77"), ({"spatial_merge_size": 3}, "merge"),
    ],
)  # fmt: skip
def test_settings_that_are_not_followed_are_refused(tokenizer, settings, reason):
    with pytest.raises((ValueError, KeyError), match=reason):
        ours(tokenizer, "mistral3", **settings)


def write(folder, tokenizer, template=TEMPLATE):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|end|>"}))


def test_the_processor_of_a_folder(transformers, tokenizer, tmp_path):
    """Settings lie in one file or in two; the tokens' numbers come from the tokenizer."""
    hf.make(transformers, tmp_path, "mistral3", {"vocab_size": 270}, image_token_index=tokenizer.token_to_id("[IMG]"))
    both = {"patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(both))
    (tmp_path / "processor_config.json").write_text(json.dumps({**SETTINGS["mistral3"], "image_token": "[IMG]"}))
    made = processor_of(tmp_path, tokenizer.token_to_id)
    assert (made.max_height, made.max_width, made.merge_size, made.patch_size) == (32, 32, 2, 4)
    (tmp_path / "preprocessor_config.json").unlink()
    assert processor_of(tmp_path, tokenizer.token_to_id).max_width == 48, "the encoder's image_size"
    section = {"image_break_token": {"content": "[INST]"}, "image_processor": {"size": {"longest_edge": 16}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(section))
    made = processor_of(tmp_path, tokenizer.token_to_id)
    assert (made.max_width, made.row_break_id) == (16, tokenizer.token_to_id("[INST]"))
    assert processor_of(tmp_path, tiny_model._tokenizer().token_to_id) is None, "a tokenizer of text"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_index": 3}))
    with pytest.raises(BadModel, match="image token 3"):
        processor_of(tmp_path, tokenizer.token_to_id)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vision_config"}))
    assert processor_of(tmp_path, tokenizer.token_to_id) is None, "a text-only conversion"


@pytest.mark.parametrize("model_type", SETTINGS)
def test_an_answer_about_two_images_is_that_of_transformers(transformers, reference, tokenizer, tmp_path, model_type):
    """Files and a conversation in, tokens out: template, processor, scheduler, engine."""
    import torch

    vocab = tokenizer.get_vocab_size()
    model, _ = hf.make(
        transformers, tmp_path, model_type, {**hf.MINISTRAL, "vocab_size": vocab}, scale=0.3,
        image_token_index=tokenizer.token_to_id("[IMG]"),
    )  # fmt: skip
    write(tmp_path, tokenizer)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 48}}')
    (tmp_path / "processor_config.json").write_text(json.dumps(SETTINGS[model_type]))
    pictures, files = [hf.picture(45, 21, 1), hf.picture(9, 60, 2)], []
    for i, picture in enumerate(pictures):
        files.append(tmp_path / f"{i}.png")
        picture.save(files[-1])
    with tandem.load(str(tmp_path), "none", dtype="float32", blas_threads=1, prefix_cache=False) as served:
        answer = tandem.generate(
            served, [{"role": "user", "content": "Which?"}], images=files, temperature=0.0, max_tokens=8,
            ignore_eos=True,
        ).token_ids  # fmt: skip
    inputs = reference(model_type)(text="[INST][IMG][IMG]Which?[/INST]", images=pictures, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    never = tokenizer.token_to_id("[IMG]")
    assert never not in answer, "transformers would look for another image; choose other weights"
    tokens = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    with torch.no_grad():
        logits = model(
            tokens, pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], use_cache=False
        ).logits[0]
    assert logits[length - 1 : -1].argmax(dim=-1).tolist() == answer
    assert len(set(answer)) > 2, "a text that tells nothing"
