"""`tandem generate` as a user runs it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tandem import LocalModel, generate
from tandem.cli import main
from tests.support import tiny_model
from tests.support.server import REPOSITORY

pytestmark = pytest.mark.mlx

MINE = ("--draft-model", "none", "--dtype", "float32", "--blas-threads", "1", "--config", os.devnull)


@pytest.fixture
def plain(folder: Path) -> tuple[str, ...]:
    return ("--model", str(folder), *MINE)


def run(*arguments: str) -> int:
    return main(["generate", *arguments])


def test_the_text_goes_to_stdout_and_the_counters_to_stderr(
    plain: tuple[str, ...], model: LocalModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("Hello", "--system", "Brief.", "--max-tokens", "12", "--temp", "0", "--ignore-eos", *plain) == 0
    shown = capsys.readouterr()
    messages = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hello"}]
    expected = generate(model, messages, max_tokens=12, temperature=0.0, ignore_eos=True)
    assert shown.out == expected.text + "\n"
    told = shown.err.splitlines()[-1]
    assert told.startswith(f"[prompt {expected.stats.num_prompt_tokens} tokens") and told.endswith("length]")
    assert "output 12 tokens" in told


def test_json_has_tokens_and_counters(
    plain: tuple[str, ...], model: LocalModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-p", "abc", "--raw", "-m", "8", "--seed", "3", "-t", "0.8", "--json", "--quiet", *plain) == 0
    shown = capsys.readouterr()
    expected = generate(model, "abc", max_tokens=8, seed=3, temperature=0.8)
    content = json.loads(shown.out)
    assert (content["text"], content["token_ids"]) == (expected.text, expected.token_ids)
    assert content["stats"]["num_output_tokens"] == len(expected.token_ids)
    assert content["stats"]["tokens_per_s"] > 0 and content["stats"]["acceptance_rate"] is None
    assert shown.err.count("[prompt") == 0


def test_the_prompt_may_come_on_standard_input(
    plain: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert run("--choice", "yes", "--choice", "no", *plain) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    assert run(*plain) == 2
    assert "The prompt is empty" in capsys.readouterr().err


def test_formats_come_from_files(plain: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    (tmp_path / "grammar.lark").write_text('start: "a" "b"')
    assert run("x", "--json-schema", str(tmp_path / "schema.json"), *plain) == 0
    assert capsys.readouterr().out.strip() in ("true", "false")
    assert run("x", "--grammar", str(tmp_path / "grammar.lark"), *plain) == 0
    assert capsys.readouterr().out.strip() == "ab"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("a", "-p", "b"), 2, "not both"),
        (("a", "--json-schema", "{nonsense"), 2, "--json-schema"),
        (("a", "--grammar", "nowhere.lark"), 2, "nowhere.lark"),
        (("a", "--reasoning-effort", "huge"), 2, "--reasoning-effort"),
        (("a", "--raw", "--system", "b"), 2, "--raw"),
        (("a", "--temperature", "9"), 1, "temperature"),
        (("a", "--image", "nowhere.png"), 1, "this model takes text only"),
        (("a", "--video", "nowhere.mp4"), 1, "this model takes text only"),
        (("a", "--thinking-budget", "9"), 1, "this model marks no reasoning"),
        (("a", "--model", "/nowhere"), 78, "no model at '/nowhere'"),
        (("a", "--port", "1"), 2, "No such option"),
    ],
)
def test_errors_are_one_line(
    plain: tuple[str, ...], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, told: str
) -> None:
    assert run(*plain, *arguments) == code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("tandem:")]
    assert len(lines) == 1 and told in lines[0]
    assert shown.out == ""


def test_a_model_without_a_chat_template_asks_for_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model.write(tmp_path / "tiny")
    (folder / "tokenizer_config.json").write_text("{}")
    assert run("a", "--model", str(folder), *MINE) == 78
    assert "--raw" in capsys.readouterr().err
    assert run("a", "--raw", "-m", "2", "--model", str(folder), *MINE) == 0


def test_control_c_ends_it_with_the_counters_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model, "MAX_POSITIONS", 100_000)  # minutes of text
    folder = tiny_model.write(tmp_path / "tiny")
    command = [sys.executable, "-m", "tandem", "generate", "Go on", "--ignore-eos", "--temp", "0"]
    command += ["--model", str(folder), "--draft-model", "none", "--cache-dir", str(tmp_path), *MINE[4:]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.read(1), "no text came"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out.endswith(b"\n")
    told = err.decode().splitlines()[-1]
    assert told.startswith("[prompt ") and told.endswith("interrupted]")
    assert "Traceback" not in err.decode()
