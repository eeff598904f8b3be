"""Commands in a real terminal that work on files: generate, convert, split-mtp, models, config, keys, completion."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from shared.supervise import EXIT_CONFIG
from tests.support import tiny_model
from tests.support.terminal import Terminal, tandem

NOBODY = "http://127.0.0.1:9"
pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "MAX_POSITIONS", 100_000)  # minutes of text
        return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


def test_an_answer_streams_and_ctrl_c_ends_it(model: Path, tmp_path: Path) -> None:
    options = ("--model", str(model), "--draft-model", "none", "--kv-cache-bytes", "64MiB", "--max-model-len", "2048")
    with Terminal(tmp_path, "generate", "Go on", "--ignore-eos", "--max-tokens", "2000", *options) as generate:
        generate.expect(r"\S")
        generate.ctrl_c()
        code, said = generate.end()
    assert code == 130
    assert said.rstrip().endswith("interrupted]") and "Traceback" not in said


def test_a_model_is_converted_and_listed(model: Path, tmp_path: Path) -> None:
    code, said = tandem(tmp_path, "convert", str(model), "cache/models/tiny-8bit", "--bits", "8", "--group-size", "32")
    assert code == 0, said
    assert (tmp_path / "cache/models/tiny-8bit/config.json").is_file()
    code, said = tandem(tmp_path, "models")
    assert code == 0 and "tiny-8bit" in said


def test_a_full_disk_in_the_middle_of_a_conversion(model: Path, tmp_path: Path) -> None:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # as the last bytes of a disk: writing fails

    with Terminal(tmp_path, "convert", str(model), "copy", "--dtype", "float32", preexec=fill) as convert:
        code, said = convert.end()
    assert code == EXIT_CONFIG, said
    assert said.count("\n") == 1 and "copy cannot be written: the disk is full" in said
    assert not (tmp_path / "copy").exists()  # nothing that looks like a model is left


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "Hi", "--model", "org/none"), "org/none"),
        (("convert", "org/none", "copy"), "org/none"),
        (("split-mtp", "org/none"), "org/none"),
        (("race", "--draft-model", "ngram", "--model", "org/none"), "org/none"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_model_that_is_not_there_without_a_network(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    code, said = tandem(tmp_path, *arguments, HF_ENDPOINT=NOBODY)
    assert code in (1, EXIT_CONFIG)
    line = said.rpartition("\r")[2] if arguments[0] == "race" else said  # its bar is gone by then
    assert said.count("\n") == 1 and line.startswith("tandem: ") and told in line, said


def test_a_model_without_a_head_has_none_to_split(model: Path, tmp_path: Path) -> None:
    code, said = tandem(tmp_path, "split-mtp", str(model))
    assert code == EXIT_CONFIG
    assert said.count("\n") == 1 and "mtp" in said


def test_what_needs_no_model(tmp_path: Path) -> None:
    assert tandem(tmp_path, "keys", "tandem.keys")[0] == 0
    assert (tmp_path / "tandem.keys").stat().st_mode & 0o777 == 0o600
    code, said = tandem(tmp_path, "keys", "tandem.keys")
    assert code == EXIT_CONFIG and said.count("\n") == 1  # it is not overwritten
    code, said = tandem(tmp_path, "config", "--port", "9000")
    assert code == 0 and "--port" in said and "9000" in said
    code, said = tandem(tmp_path, "completion", "bash")
    assert code == 0 and "complete" in said
    code, said = tandem(tmp_path, "bench")
    assert code == 0 and "drafters" in said
