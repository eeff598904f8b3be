"""`tandem convert` as a user runs it; what it writes is tested with tandem.convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.cli import main
from tests.support import tiny_model

pytestmark = pytest.mark.mlx


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, size in {"HIDDEN": 64, "INNER": 64, "HEAD_DIM": 16}.items():
        monkeypatch.setattr(tiny_model, name, size)
    return tiny_model.write(tmp_path / "source")


@pytest.mark.parametrize(
    ("arguments", "quantization"),
    [
        (("--bits", "8"), {"mode": "affine", "bits": 8, "group_size": 64}),
        (("-q",), {"mode": "affine", "bits": 4, "group_size": 64}),
        (("-q", "--q-mode", "mxfp4"), {"mode": "mxfp4", "bits": 4, "group_size": 32}),
        (("--q-bits", "3", "--q-group-size", "32"), {"mode": "affine", "bits": 3, "group_size": 32}),
        (("--dtype", "float16"), None),
    ],
)
def test_options_say_how(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], quantization: object
) -> None:
    made = tmp_path / "made"
    assert main(["convert", str(source), str(made), *arguments]) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert json.loads((made / "config.json").read_text()).get("quantization") == quantization


def test_names_of_mlx_lms_options_work(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "made"), "--quant-predicate", "mixed_2_6"]
    assert main(["convert", *names]) == 0
    assert main(["convert", str(tmp_path / "made"), str(tmp_path / "plain"), "-d"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "Give MODEL."),
        (("SOURCE",), 2, "Give OUTPUT."),
        (("SOURCE", "made", "-o", "made"), 2, "OUTPUT is given twice."),
        (("SOURCE", "made", "--bits", "7"), 78, "bits 7: mode affine has 2, 3, 4, 5, 6, 8"),
        (("SOURCE", "made", "--mode", "int4"), 2, "int4"),
        (("SOURCE", "SOURCE"), 78, "exists: name a folder"),
        (("SOURCE", "made", "--private"), 2, "--private needs --upload"),
        (("SOURCE", "made", "--upload", "nonsense"), 78, "'owner/name'"),
        (("/nowhere", "made"), 78, "no model at '/nowhere'"),
    ],
)
def test_errors_are_one_line(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(str(source) if part == "SOURCE" else part for part in arguments)]) == code
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and told in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
