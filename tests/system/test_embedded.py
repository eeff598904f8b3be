"""The embedded model, as a new user meets it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import documented
from tests.support.server import REPOSITORY, Server

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
        if shutil.which("curl"):
            assert_readme_streams(server.port)
    finally:
        server.stop()


def assert_readme_streams(port: int) -> None:
    """The README's own command."""
    (shown,) = [line for line in documented.lines(REPOSITORY / "README.md") if line.words[0] == "curl"]
    command = [word.replace("8080", str(port)) for word in shown.words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) > 40 and lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])
