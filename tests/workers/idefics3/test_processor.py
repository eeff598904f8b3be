"""Images and prompts of Idefics3 and SmolVLM as the frontend prepares them, against transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest

from frontend.chat_template import ChatTemplate
from shared.errors import InvalidRequest
from tests.support.media_oracle import normalised
from tests.support.tiled_text import IMAGE, MODEL_TYPES, TEMPLATE
from tests.workers.idefics3 import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

SETTINGS = {
    "small tiles": {},
    "tiles that do not divide the longest edge": {
        "size": {"longest_edge": 50}, "max_image_size": {"longest_edge": 24}, "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    },
    "a tile is the longest edge": {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}},
    "the whole only, bilinear, not normalised": {"do_image_splitting": False, "resample": 2, "do_normalize": False},
    "as released": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
}  # fmt: skip
SIZES = ((3, 5), (40, 24), (16, 16), (77, 301), (250, 249), (400, 1), (1, 33), (20, 50), (50, 20))


@pytest.fixture(scope="module")
def reference(transformers, tmp_path_factory):
    return hf.make(transformers, tmp_path_factory.mktemp("model"), "smolvlm")[0]


@pytest.mark.parametrize("case", SETTINGS)
def test_pixels_equal_those_of_transformers(transformers, reference, case):
    ours = hf.processor(reference, SETTINGS[case])
    theirs = hf.hf_processor(transformers, "smolvlm", ours, SETTINGS[case]).image_processor
    for width, height in SIZES[1:2] if case == "as released" else SIZES:
        picture = hf.picture(width, height, width)
        wanted = theirs(images=[picture], return_tensors="np", return_row_col_info=True)
        made = hf.prompt(ours, "smolvlm", "<image>", [picture])
        got = np.stack([normalised(media).transpose(2, 0, 1) for media in made.media])
        np.testing.assert_allclose(got, wanted["pixel_values"][0], rtol=0, atol=1e-6)
        assert len(got) == wanted["rows"][0][0] * wanted["cols"][0][0] + 1
        assert wanted["pixel_attention_mask"].all(), "a tile that is padded"


CONVERSATIONS = {
    "text": [{"role": "user", "content": ["Only a text"]}],
    "an image first": [{"role": "user", "content": [(40, 24), "What is it?"]}],
    "two images, turns": [
        {"role": "system", "content": ["Be short."]},
        {"role": "user", "content": ["This\n", (77, 301), "\n\nand this ", (16, 16)]},
        {"role": "assistant", "content": ["A cat.\n"]},
        {"role": "user", "content": [(30, 30), (5, 60)]},
    ],
}


@pytest.mark.parametrize(
    "case", ["small tiles", "a tile is the longest edge", "the whole only, bilinear, not normalised"]
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prompts_equal_those_of_transformers(transformers, reference, model_type, case):
    """The same messages give the same tokens; texts may come as strings, which the families' template does not know."""
    ours = hf.processor(reference, SETTINGS[case])
    theirs = hf.hf_processor(transformers, model_type, ours, SETTINGS[case])
    for name, conversation in CONVERSATIONS.items():
        pictures = [hf.picture(*part) for m in conversation for part in m["content"] if not isinstance(part, str)]
        shown, given = [], iter(pictures)
        for message in conversation:
            parts = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": next(given)}
                for part in message["content"]
            ]
            shown.append({"role": message["role"], "content": parts})
        wanted = theirs.apply_chat_template(
            shown, TEMPLATE, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        plain = [
            m if len(m["content"]) > 1 else {**m, "content": m["content"][0].get("text", m["content"])} for m in shown
        ]
        text = ChatTemplate(TEMPLATE, {}).render(plain)
        made = hf.prompt(ours, model_type, text, pictures)
        assert made.tokens == wanted["input_ids"][0], name
        assert [made.tokens[m.start : m.start + m.num_tokens] for m in made.media] == [
            [IMAGE] * ours.num_tile_tokens for _ in made.media
        ]
        assert made.tokens.count(IMAGE) == len(made.media) * ours.num_tile_tokens


@pytest.mark.parametrize("prompt", ["<image> and <image>", "none"])
def test_a_prompt_that_does_not_name_each_image_once_is_refused(reference, prompt):
    with pytest.raises(InvalidRequest, match="places for 1 images and videos"):
        hf.processor(reference).rewrite(prompt, [["a"]])
