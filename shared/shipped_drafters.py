"""Drafters that lie in this repository, found by name: `--draft-model dflash`. They are for the embedded model only.

A drafter is trained on the hidden states and texts of one target. With another one its drafts would be checked and
rejected, which costs speed and shows nowhere else, so it is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from shared.config import Settings
from shared.errors import BadModel
from shared.model_files import EMBEDDED_MEMBER, EMBEDDED_NAME, ModelFiles, resolve

FOLDER = Path(__file__).resolve().parent / "drafters"
KNOWN = ("dflash", "eagle3", "mtp")  # names that are never looked for elsewhere, whether they are shipped or not
EMBEDDED_GGUF = Path(EMBEDDED_MEMBER).name
EMBEDDED_BYTES = 98_362_432
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # no path


def shipped() -> dict[str, Path]:
    """Name -> folder of what is there."""
    return {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/config.json"))}


def resolve_drafter(settings: Settings) -> ModelFiles:
    """The files of `settings.draft_model`: a shipped drafter's, or those that `resolve` finds.

    Raises:
        BadModel: nothing is there, or the drafter is shipped for another target.
    """
    name = settings.draft_model
    found = shipped() if _NAME.fullmatch(name) else {}
    if name not in KNOWN and name not in found:
        return resolve(name, settings)
    if name not in found:
        there = ", ".join(found) or "none"
        raise BadModel(
            f"no drafter {name!r} is shipped with this version (shipped: {there}); give a folder or a hub id"
        )
    if not is_embedded(settings):
        raise BadModel(
            f"the drafter {name!r} was trained for {EMBEDDED_NAME}, the embedded model, and {settings.model!r} is not "
            "that; give a drafter of this model, ngram or none"
        )
    return ModelFiles(name=name, folder=found[name])


def is_embedded(settings: Settings) -> bool:
    """Whether the target is the embedded model, by its own name or as the file that `tandem fetch` names."""
    if settings.model in ("", "default"):
        return True
    path = Path(settings.model).expanduser()
    return path.name == EMBEDDED_GGUF and path.is_file() and path.stat().st_size == EMBEDDED_BYTES
