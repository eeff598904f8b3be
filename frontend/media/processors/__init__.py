"""From decoded media to the arrays that a family's encoder takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frontend.media.processors import qwen
from frontend.media.processors.base import Processor
from shared.errors import BadModel

FAMILIES = {name: qwen.from_configs for name in qwen.MODEL_TYPES}


def processor_of(folder: Path) -> Processor | None:
    """What prepares images for the model in `folder`; None for one that takes text only.

    Raises:
        BadModel: its configuration is malformed.
    """
    config = _read(folder / "config.json")
    make = FAMILIES.get(str(config.get("model_type")))
    if make is None:
        return None
    try:
        return make(config, _read(folder / "preprocessor_config.json"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadModel(f"{folder.name}: malformed image settings: {error!r}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BadModel(f"{path.name} is not an object")
    return found
