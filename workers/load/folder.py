"""Hugging Face folders: config.json and safetensors, plain or quantised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.nn as nn

from shared.errors import BadModel
from workers.models.own import WITH_ENCODERS, own_of
from workers.safetensors import check_safetensors


def load_folder(folder: Path, max_model_len: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model with its weights, not yet read from disk, and its configuration.

    Raises:
        BadModel: as `load` says.
    """
    from mlx_lm.utils import load_model

    config = read_config(folder)
    for path in weight_files(folder):
        check_safetensors(path)
    try:
        model, config = load_model(
            folder,
            lazy=True,
            model_config={"model_type": config["model_type"]},
            get_model_classes=_Classes(max_model_len),
        )
    except BadModel:
        raise
    except Exception as error:  # a hostile or odd configuration can fail anywhere in a model's constructor
        raise BadModel(f"{folder.name} ({config['model_type']}): {_short(error)}") from error
    return model, config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked as far as the choice of a model needs."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadModel(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadModel(f"{folder}/config.json names no model_type")
    if config.get("model_file") is not None:
        raise BadModel(f"{folder} wants to run its own code ({config['model_file']!r}); that is not supported")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that mlx-lm will read; with an index, every shard that it names must be there."""
    index = folder / "model.safetensors.index.json"
    found = sorted(folder.glob("model*.safetensors"))
    if index.exists():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise BadModel(f"{index} cannot be read: {error}") from error
        missing = sorted(wanted - {path.name for path in found})
        if missing:
            raise BadModel(f"{folder} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if not found:
        raise BadModel(f"{folder} holds no model*.safetensors")
    return found


class _Classes:
    """Chooses our own definition, or mlx-lm's, in the form that `mlx_lm.utils.load_model` asks for."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len

    def __call__(self, config: dict[str, Any]) -> tuple[Any, Any]:
        own = own_of(config) or WITH_ENCODERS.get(config["model_type"])
        return (own.model, self) if own is not None else mlx_lm_classes(config)

    def from_dict(self, config: dict[str, Any]) -> Any:  # noqa: ANN401 - each family has a type of its own
        own = own_of(config) or WITH_ENCODERS[config["model_type"]]
        return own.read_config(config, self.max_model_len)


def mlx_lm_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's Model and ModelArgs of a configuration.

    Raises:
        BadModel: mlx-lm does not define this architecture.
    """
    from mlx_lm.utils import _get_classes

    model_type = config["model_type"]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", model_type):
        raise BadModel(f"unknown model_type {model_type!r}")
    try:
        model, args = _get_classes(config)
    except SystemExit as error:  # mlx-lm's olmo leaves the interpreter where its package is missing
        raise BadModel(f"{model_type}: mlx-lm needs another package for it, see its message above") from error
    except (ValueError, AttributeError) as error:
        raise BadModel(f"unknown model_type {model_type!r}: neither Tandem nor mlx-lm defines it") from error
    return model, args


def _short(error: Exception) -> str:
    """The first lines of a message; a missing-parameter error lists hundreds of names."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    more = f" (and {len(lines) - 4} more lines)" if len(lines) > 4 else ""
    return " ".join(line.strip()[:300] for line in lines[:4]) + more
