"""LoRA adapters by name, as the setting `adapters` lists them: `name=place, name=place`.

The frontend takes the names as models; the target reads what lies at the places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from shared.errors import BadConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def parse(setting: str) -> dict[str, str]:
    """Name -> folder or Hugging Face id, in the setting's order. A place without a name is called by its last part.

    Raises:
        BadConfig: a part is empty, a name is malformed or given twice.
    """
    found: dict[str, str] = {}
    for part in setting.split(",") if setting.strip() else ():
        name, equals, place = (text.strip() for text in part.partition("="))
        if not equals:
            name, place = PurePath(name).name, name
        if not place or not _NAME.fullmatch(name):
            raise BadConfig(f"adapters: {part.strip()!r} is not name=folder or name=org/repository")
        if name in found:
            raise BadConfig(f"adapters: two are named {name!r}")
        found[name] = place
    return found


def to_setting(adapters: Mapping[str, str]) -> str:
    """The setting from which `parse` makes `adapters` again.

    Raises:
        BadConfig: a name or a place cannot be part of it.
    """
    setting = ",".join(f"{name}={place}" for name, place in adapters.items())
    if parse(setting) != dict(adapters):
        raise BadConfig(f"adapters: a name or a place has a comma, an equals sign or spaces around it: {setting!r}")
    return setting
