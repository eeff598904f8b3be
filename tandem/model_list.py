"""The models on this machine: those in Tandem's cache folder and those in Hugging Face's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from shared.config import Settings
from shared.errors import BadModel
from shared.model_files import EMBEDDED_MEMBER, ModelFiles, resolve


class CachedModel(msgspec.Struct, frozen=True):
    """`name` is what `--model` takes."""

    name: str
    place: Literal["tandem", "hub"]
    path: Path
    num_bytes: int


def cached(settings: Settings) -> list[CachedModel]:
    """Every model, by name."""
    return sorted([*_own(settings), *_of_hub()], key=lambda model: (model.place == "hub", model.name.lower()))


def files_of(model: CachedModel) -> ModelFiles:
    """Raises:
    BadModel: the folder holds neither a config.json nor one GGUF file.
    """
    return resolve(str(model.path), Settings())


def _own(settings: Settings) -> list[CachedModel]:
    found = []
    for path in sorted((settings.cache_folder / "models").glob("*")):
        if path.suffix == ".gguf":
            name = "default" if path.name == Path(EMBEDDED_MEMBER).name else str(path)
            found.append(CachedModel(name, "tandem", path, path.stat().st_size))
        elif (path / "config.json").exists():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(CachedModel(str(path), "tandem", path, size))
    return found


def _of_hub() -> list[CachedModel]:
    """The newest snapshot of each repository; one that is damaged is left out, as the hub's own tools do."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []  # nothing was ever downloaded
    except OSError as error:
        raise BadModel(f"Hugging Face's cache cannot be read: {error}") from error
    found = []
    for repository in repositories:
        if repository.repo_type != "model" or not repository.revisions:
            continue
        newest = max(repository.revisions, key=lambda revision: revision.last_modified)
        found.append(CachedModel(repository.repo_id, "hub", newest.snapshot_path, newest.size_on_disk))
    return found
