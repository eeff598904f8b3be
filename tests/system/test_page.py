"""The chat page in a real Chromium and the origins of its tokens, with all real processes and a tiny vision model."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from tests.support.browser import IS_MISSING, WHY_NOT, Visit, chromium
from tests.support.server import Server
from tests.system.test_media import part, uri

pytestmark = [pytest.mark.system, pytest.mark.mlx]


def streamed(drafting_server: Server, **changes: Any) -> list[dict[str, Any]]:
    body = {
        "model": "default", "messages": [{"role": "user", "content": "ab ab"}], "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "return_token_origins": True, "max_tokens": 150, "ignore_eos": True,
    }  # fmt: skip
    chunks = []
    with httpx.stream("POST", f"{drafting_server.url}/v1/chat/completions", json=body | changes, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
    return chunks


def test_origins_add_up_to_timings(drafting_server: Server) -> None:
    tokens = httpx.post(f"{drafting_server.url}/tokenize", json={"prompt": "ab"}).json()["tokens"]
    chunks = streamed(
        drafting_server, logit_bias={str(token): 60 for token in tokens}
    )  # a text of two letters repeats itself
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    origins = [origin for choice in choices for origin in choice.get("tandem", {}).get("origins", [])]
    timings = next(chunk["timings"] for chunk in chunks if "timings" in chunk)
    drafted = [origin for origin in origins if origin["origin"] != "target"]
    assert {origin["origin"] for origin in drafted} <= {"ngram", "suffix"}
    assert len(drafted) == timings["draft_n_accepted"] > 10
    assert timings["draft_n"] > timings["draft_n_accepted"], "some are rejected too"
    assert choices[-1]["tandem"]["draft_n"] == timings["draft_n"]
    assert len(origins) == chunks[-1]["usage"]["completion_tokens"] == 150
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text.startswith("".join(origin["text"] for origin in origins)), "but for a broken last character"


@pytest.mark.skipif(IS_MISSING, reason=WHY_NOT)
def test_an_image_is_answered_in_a_browser(drafting_server: Server) -> None:
    _, data = part(1)["image_url"]["url"].split(",")
    image = {"name": "picture.png", "mimeType": "image/png", "buffer": base64.b64decode(data)}
    assert uri(image["buffer"]).endswith(data)
    with chromium() as browser, Visit(browser) as visit:
        page = visit.page
        page.add_init_script("localStorage.setItem('tandem.settings', JSON.stringify({ max_tokens: '40' }))")
        page.goto(f"{drafting_server.url}/ui")
        page.wait_for_selector("#model-state[data-state=ready]")
        page.click("#view-tokens")
        page.set_input_files("#image-files", image)  # type: ignore[arg-type] # the stub wants a TypedDict
        page.fill("#prompt", "What is it?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant .token >> nth=2")
        page.wait_for_selector(".assistant:not(.streaming)")
        tokens = page.locator(".assistant .token").count()
        stats = page.inner_text(".assistant .stats")
        assert f"{tokens} token" in stats and "tokens/s" in stats
        page.reload()
        page.wait_for_selector(".assistant .token")
        assert page.locator(".assistant .token").count() == tokens
        assert page.locator(".user img").evaluate("image => image.naturalWidth") == 40
