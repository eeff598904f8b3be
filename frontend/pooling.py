"""How an embedding checkpoint wants its hidden rows pooled: sentence-transformers' files beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from shared.errors import BadModel
from shared.messages import Pooling

_KINDS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean"}
_MODULES = ("Transformer", "Pooling", "Normalize")  # what is computed here


class CheckpointPooling(Struct, frozen=True):
    """`kind` is None where the checkpoint asks for what is not computed here; `reason` says what."""

    kind: Pooling | None
    reason: str = ""


def of_folder(folder: Path) -> CheckpointPooling | None:
    """None for a folder that is no embedding model's.

    Raises:
        BadModel: its files are malformed.
    """
    modules_path = folder / "modules.json"
    if not modules_path.exists() and not (folder / "1_Pooling").is_dir():
        return None
    pooling_folder = folder / "1_Pooling"
    if modules_path.exists():
        for module in _read(modules_path, list):
            name = str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else str(module)
            if name not in _MODULES:
                return CheckpointPooling(None, f"its module {name!r} is not supported")
            if name == "Pooling":
                pooling_folder = folder / str(module.get("path"))
    found = _modes(_read(pooling_folder / "config.json", dict))
    if len(found) != 1 or found[0] not in _KINDS:
        return CheckpointPooling(None, f"pooling by {' and '.join(found) or 'nothing'} is not supported")
    return CheckpointPooling(_KINDS[found[0]])


def _modes(config: dict[str, Any]) -> list[str]:
    """One name in newer files, a flag for each in older ones."""
    if isinstance(config.get("pooling_mode"), str):
        return [config["pooling_mode"]]
    return [key.removeprefix("pooling_mode_") for key in config if key.startswith("pooling_mode_") and config[key]]


def _read(path: Path, kind: type) -> Any:  # noqa: ANN401 - JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"{path} cannot be read: {error}") from error
    if not isinstance(content, kind):
        raise BadModel(f"{path}: expected a JSON {'array' if kind is list else 'object'}")
    return content
