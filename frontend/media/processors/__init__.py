"""From decoded media to the arrays that a family's encoder takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frontend.media.processors import gemma, idefics3, qwen
from frontend.media.processors.base import Processor
from shared.errors import BadModel

FAMILIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Processor | None]] = {
    **dict.fromkeys(qwen.MODEL_TYPES, qwen.from_configs),
    **dict.fromkeys(gemma.MODEL_TYPES, gemma.from_configs),
    **dict.fromkeys(idefics3.MODEL_TYPES, idefics3.from_configs),
}


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
        return make(config, _settings(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadModel(f"{folder.name}: malformed image settings: {error!r}") from error


def _settings(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json; newer checkpoints have processor_config.json with sections in its place.

    What is for videos is the section `video_processor`, or lies in a file of its own.
    """
    found = _read(folder / "processor_config.json") | _read(folder / "preprocessor_config.json")
    video = _read(folder / "video_preprocessor_config.json")
    return found | ({"video_processor": video} if video else {})


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
