"""The embedded model, as a new user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.embedded]


def test_the_embedded_model_streams_why_the_sky_is_blue(tmp_path: Path) -> None:
    server = Server("default", tmp_path).start(wait=False)
    try:
        server.wait_ready(220)  # on a fresh machine this downloads the weights
        messages: list[Any] = [{"role": "user", "content": "Why is the sky blue?"}]
        with server.openai() as client:
            stream = client.chat.completions.create(
                model="default", messages=messages, stream=True, max_tokens=48, temperature=0
            )
            pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
        answer = "".join(pieces).lower()
        assert len(pieces) > 20
        assert "sky" in answer
        assert "light" in answer or "scatter" in answer or "atmosphere" in answer
        assert all(character.isprintable() or character.isspace() for character in answer)
    finally:
        server.stop()
