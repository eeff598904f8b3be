"""Images through the real processes: pixels matter, order does, and a killed target changes nothing."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import tiny_model
from tests.support.server import Server
from tests.workers.qwen import hf

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.oracle]

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|image|>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}<|start|>assistant"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("torch").set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("images")
    model = tiny_model.write(folder / "tiny-qwen2-vl")
    tokenizer = tiny_model._tokenizer()
    tokenizer.add_special_tokens(["<|image|>"])
    hf.make(
        transformers, model, "qwen2_vl", {"vocab_size": tokenizer.get_vocab_size()}, scale=0.3,
        image_token_id=tokenizer.token_to_id("<|image|>"),
    )  # fmt: skip
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>"}))
    limits = {"min_pixels": 64, "max_pixels": 4096, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    (model / "preprocessor_config.json").write_text(json.dumps(limits))
    with Server(model, folder, dtype="float32", draft_model="none") as running:
        yield running


def uri(seed, width=40, height=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def body(seeds, **more):
    parts = [{"type": "image_url", "image_url": {"url": uri(seed)}} for seed in seeds]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": True, **more}


def answer(server, seeds):
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body(seeds), timeout=60)
    assert reply.status_code == 200, reply.text
    content = reply.json()
    return [token["logprob"] for token in content["choices"][0]["logprobs"]["content"]], content["usage"]


def test_answers_depend_on_the_pixels_and_their_order(server):
    assert httpx.get(f"{server.url}/health").json()["input_modalities"] == ["text", "image"]
    first, usage = answer(server, [1, 2])
    assert len(first) == 24
    assert usage["prompt_tokens"] == 30 + len("<user\nwhat is this?><assistant")  # < and > stand for special tokens
    again, _ = answer(server, [1, 2])
    np.testing.assert_allclose(again, first, atol=1e-5)
    swapped, _ = answer(server, [2, 1])
    assert np.abs(np.array(swapped) - first).max() > 1e-3
    bad = {**body([1]), "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}  # fmt: skip
    assert httpx.post(f"{server.url}/v1/chat/completions", json=bad, timeout=60).status_code == 400


def test_a_target_killed_while_it_answers_changes_nothing(server):
    request = {**body([3, 4], max_tokens=200), "logprobs": False}
    url = f"{server.url}/v1/chat/completions"
    whole = httpx.post(url, json=request, timeout=60).json()["choices"][0]["message"]["content"]
    text = ""
    with httpx.stream("POST", url, json={**request, "stream": True}, timeout=90) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            text += (choices[0]["delta"].get("content") or "") if choices else ""
            if text and server is not None:
                server.worker("workers.target").kill()
                server = None
    assert server is None, "the target was never killed"
    assert text == whole
