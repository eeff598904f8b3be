"""From decoded media to the arrays that a family's encoder takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frontend.media.processors import gemma, idefics3, lfm2_vl, minicpm_v, pixtral, qwen
from frontend.media.processors.base import Processor
from shared.errors import BadModel

TokenId = Callable[[str], int | None]

FAMILIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Processor | None]] = {
    **dict.fromkeys(qwen.MODEL_TYPES, qwen.from_configs),
    **dict.fromkeys(gemma.MODEL_TYPES, gemma.from_configs),
    **dict.fromkeys(idefics3.MODEL_TYPES, idefics3.from_configs),
    **dict.fromkeys(lfm2_vl.MODEL_TYPES, lfm2_vl.from_configs),
}
# Those whose prompts have tokens that their configurations name by text only.
NAMING_FAMILIES: dict[str, Callable[[dict[str, Any], dict[str, Any], TokenId], Processor | None]] = {
    **dict.fromkeys(pixtral.MODEL_TYPES, pixtral.from_configs),
    **dict.fromkeys(minicpm_v.MODEL_TYPES, minicpm_v.from_configs),
}


def _no_token(text: str) -> None:
    """Of a tokenizer that nobody asked for."""


def processor_of(folder: Path, token_id: TokenId = _no_token) -> Processor | None:
    """What prepares images for the model in `folder`; None for one that takes text only.

    Args:
        token_id: of the model's tokenizer; None for a text that is no token.
    Raises:
        BadModel: its configuration is malformed.
    """
    config = _read(folder / "config.json")
    name = str(config.get("model_type"))
    try:
        if name in NAMING_FAMILIES:
            return NAMING_FAMILIES[name](config, _settings(folder), token_id)
        return FAMILIES[name](config, _settings(folder)) if name in FAMILIES else None
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
