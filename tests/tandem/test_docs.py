"""The examples of docs/python-api.md, docs/convert.md and docs/cli.md, and those of docstrings, run as they stand.

They run in a folder where the models that they name lie, tiny and random, and with a server on TANDEM_PORT whose engine
is played.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.config import Settings
from shared.messages import CacheReply
from tandem.cli import main
from tests.frontend.conftest import EOS, RunningServer, byte_text, ids
from tests.support import documented, tiny_model
from tests.support.fake_engine import FakeEngine, says
from tests.support.server import REPOSITORY

pytestmark = pytest.mark.mlx

_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A docstring's example: indented lines from one that imports tandem to the next line that is not indented.
_EXAMPLE = re.compile(r"^ {4}from tandem.*(?:\n(?: {4}.*|\s*))*", re.MULTILINE)
# Commands whose lines in docs/cli.md run elsewhere, since they need a server of their own, a terminal or a network.
ELSEWHERE = {
    "serve": "tests/system/test_start_stop.py", "chat": "tests/system/test_cli_server.py",
    "run": "tests/system/test_cli_server.py", "restart": "tests/system/test_cli_server.py",
    "doctor": "tests/system/test_cli_server.py", "race": "tests/system/test_race.py",
    "pull": "tests/tandem/test_terminal.py", "split-mtp": "tests/workers/qwen/test_mtp.py",
    **dict.fromkeys(("models", "config", "keys", "completion"), "tests/tandem/test_cli_docs.py"),
}  # fmt: skip
TEMPLATE = "{% if tools %}{{ tools }}{% endif %}" + tiny_model.TEMPLATE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with all that examples name; nothing of the user's own settings."""
    for name, size in {"HIDDEN": 128, "INNER": 128, "HEAD_DIM": 32}.items():
        monkeypatch.setattr(tiny_model, name, size)
    for model in ("Qwen/Qwen3-0.6B", "org/model"):
        tiny_model.write(tmp_path / model, template=TEMPLATE)
    tiny_model.write_eagle3(tmp_path / "org/eagle3-drafter", tmp_path / "Qwen/Qwen3-0.6B")
    tiny_model.write_qwen2_vl(tmp_path / "Qwen/Qwen2-VL-2B-Instruct")
    tiny_model.write_qwen2_vl(tmp_path / "org/name")
    tiny_model.write_eagle3(tmp_path / "org/drafter", tmp_path / "org/name")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    for name in ("cat.png", "a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {}, "additionalProperties": false}')
    (tmp_path / "question.txt").write_text("What is a tandem?")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_REASONING_PARSER", "think")
    monkeypatch.setenv("TANDEM_TOOL_PARSER", "hermes")
    monkeypatch.setenv("TANDEM_BLAS_THREADS", "1")
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    settings = Settings(run_dir=str(tmp_path / "run"), cache_dir=str(tmp_path), heartbeat_interval_s=0.2)
    (tmp_path / "run").mkdir()
    with FakeEngine(settings.engine_endpoint) as engine:
        engine.on_submit = says([*ids("Hello"), EOS])
        engine.cache_reply = CacheReply(query_id=0, enabled=True)
        server = RunningServer(settings, byte_text())
        try:
            server.wait_status("/health", 200)
            monkeypatch.setenv("TANDEM_PORT", str(server.port))
            yield tmp_path
        finally:
            server.close()


@pytest.mark.parametrize("page", ["python-api.md", "convert.md"])
def test_every_example_of_the_page_runs(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = _BLOCK.findall((REPOSITORY / "docs" / page).read_text())
    assert len(blocks) >= 2
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, page, "exec"), names)
        else:
            for line in code.splitlines():
                _run_command(line, monkeypatch)
        assert capsys.readouterr().out.strip(), f"this example shows nothing:\n{code}"


def _run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command line of ours, perhaps with a file on its standard input."""
    program, *arguments = shlex.split(line)
    assert program == "tandem", line
    if "<" in arguments:
        place = arguments.index("<")
        monkeypatch.setattr(sys, "stdin", io.StringIO(Path(arguments[place + 1]).read_text()))
        arguments = arguments[:place]
    assert main(arguments) == 0, line


def test_the_lines_of_the_command_page_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = os.environ["TANDEM_PORT"]
    monkeypatch.setenv("TANDEM_MODEL", "Qwen/Qwen3-0.6B")
    monkeypatch.setattr(sys, "argv", sys.argv)  # benchmarks change it
    ran = set()
    for shown in documented.lines(REPOSITORY / "docs/cli.md"):
        command, *arguments = shown.words[1:] if shown.in_block else ("",)
        if not command or command in ELSEWHERE or "--upload" in arguments:
            continue
        arguments = [re.sub(r"^9000$|8080$", port, a) for a in arguments]
        match command:
            case "status" if "--once" not in arguments:
                arguments.append("--once")  # it would go on until Ctrl-C
            case "generate" if "--max-tokens" not in arguments:
                arguments += ["--max-tokens", "8"]
            case "bench" if "prefix" in arguments:
                continue  # minutes, with servers of its own: `make bench`
        assert main([command, *arguments]) == 0, shown
        assert capsys.readouterr().out.strip(), shown
        ran.add(command)
    assert ran == {"generate", "convert", "status", "bench"}
    for command, test in ELSEWHERE.items():
        assert f'"{command}"' in (REPOSITORY / test).read_text() or command == "serve", (command, test)


@pytest.mark.parametrize("module", ["tandem", "tandem.api", "tandem.client", "tandem.convert"])
def test_examples_of_docstrings_run(module: str, place: Path) -> None:
    text = importlib.import_module(module).__doc__ or ""
    examples = _EXAMPLE.findall(text)
    assert examples
    for example in examples:
        exec(compile(textwrap.dedent(example), module, "exec"), {})
