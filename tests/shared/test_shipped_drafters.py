"""Drafters found by name: for the embedded model alone, and small enough to be part of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import shipped_drafters
from shared.config import Settings
from shared.errors import BadModel
from shared.shipped_drafters import resolve_drafter
from shared.supervise import EXIT_CONFIG

MAX_BYTES = 40_000_000


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped drafters with one in it."""
    (tmp_path / "dflash").mkdir()
    (tmp_path / "dflash" / "config.json").write_text("{}")
    monkeypatch.setattr(shipped_drafters, "FOLDER", tmp_path)
    return tmp_path


def test_a_shipped_drafter_is_found_by_its_folders_name(shipped: Path) -> None:
    (shipped / "dflash-4l").mkdir()
    (shipped / "dflash-4l" / "config.json").write_text("{}")
    for name in ("dflash", "dflash-4l"):
        assert resolve_drafter(Settings(draft_model=name)).folder == shipped / name


def test_the_embedded_models_own_file_is_the_embedded_model(shipped: Path, tmp_path: Path) -> None:
    gguf = tmp_path / shipped_drafters.EMBEDDED_GGUF
    with gguf.open("wb") as file:
        file.truncate(shipped_drafters.EMBEDDED_BYTES)
    assert resolve_drafter(Settings(draft_model="dflash", model=str(gguf))).folder == shipped / "dflash"
    with gguf.open("wb") as file:
        file.truncate(17)
    with pytest.raises(BadModel, match="trained for SmolLM2"):
        resolve_drafter(Settings(draft_model="dflash", model=str(gguf)))


def test_another_target_is_refused_by_name(shipped: Path) -> None:
    with pytest.raises(BadModel, match=r"'dflash' was trained for SmolLM2-135M-Instruct.*'org/other'"):
        resolve_drafter(Settings(draft_model="dflash", model="org/other"))


def test_a_known_name_that_is_not_shipped_is_not_looked_for_elsewhere(shipped: Path) -> None:
    with pytest.raises(BadModel, match=r"no drafter 'mtp' is shipped with this version \(shipped: dflash\)"):
        resolve_drafter(Settings(draft_model="mtp"))


def test_the_command_line_says_so_before_anything_starts(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tandem", "serve", "--model", str(tmp_path), "--draft-model", "eagle3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_CONFIG
    assert "eagle3" in done.stderr and "Traceback" not in done.stderr


def test_folders_are_found_as_before(shipped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own" / "dflash"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_drafter(Settings(draft_model=str(folder), model="org/other")).folder == folder
    with pytest.raises(BadModel, match="no model at"):
        resolve_drafter(Settings(draft_model="nothing"))


def test_what_is_shipped_fits_into_the_repository() -> None:
    files = [path for path in shipped_drafters.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    for folder in shipped_drafters.shipped().values():
        assert (folder / "model.safetensors").is_file()
        assert (folder / "README.md").is_file(), f"{folder.name} has no card"
