"""LoRA adapters without a server: Python, `tandem generate`, and the clients of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shared.errors import BadModel, NotFound
from tandem import LocalModel, generate, load
from tandem.cli import main
from tandem.client.exchange import completion_body
from tests.support import tiny_model
from tests.support.tiny_adapter import write_mlx

pytestmark = pytest.mark.mlx

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    size = (tiny_model.HIDDEN, tiny_model.HEADS * tiny_model.HEAD_DIM)
    sizes = {f"model.layers.{i}.self_attn.q_proj": size for i in range(tiny_model.LAYERS)}
    return str(write_mlx(tmp_path_factory.mktemp("adapter") / "sql", sizes))


def test_a_prompt_and_a_conversation_are_answered_with_the_adapter(folder: Path, place: str, model: LocalModel) -> None:
    with load(str(folder), "none", dtype="float32", blas_threads=1, adapters=place) as adapted:
        for prompt in ("abc", [{"role": "user", "content": "abc"}]):
            plain = generate(model, prompt, **GREEDY)  # type: ignore[call-overload]  # one of two forms
            assert generate(adapted, prompt, **GREEDY).text == plain.text  # type: ignore[call-overload]
            assert generate(adapted, prompt, adapter="sql", **GREEDY).text != plain.text  # type: ignore[call-overload]
        with pytest.raises(NotFound, match="with the adapters 'sql'"):
            generate(adapted, "abc", adapter="sqll")
    with pytest.raises(NotFound):
        generate(model, "abc", adapter="sql")


def test_the_command_line_takes_both(folder: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ("--draft-model", "none", "--dtype", "float32", "--blas-threads", "1", "--config", os.devnull)
    command = ["generate", "abc", "-t", "0", "-m", "20", "--ignore-eos", "--model", str(folder), *mine]
    texts = []
    for more in ([], ["--adapters", f"sql={place}"], ["--adapters", f"sql={place}", "--adapter", "sql"]):
        assert main([*command, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert main([*command, "--adapter", "sql"]) != 0
    assert "no model 'sql' here" in capsys.readouterr().err


def test_a_bad_adapter_is_told_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="adapter 'sql': nothing at"):
        load(str(folder), "none", adapters=f"sql={tmp_path / 'absent'}")


def test_a_client_sends_it_as_the_model() -> None:
    assert b'"model":"sql"' in completion_body("abc", {"adapter": "sql"}, stream=False)
    assert b'"model":"default"' in completion_body("abc", {}, stream=False)
