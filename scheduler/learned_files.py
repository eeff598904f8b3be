"""Keeps what speculation learned in the cache folder, a file for each pair of models and device.

A file that cannot be read counts as none, and a folder that cannot be written costs nothing but the knowledge.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from scheduler.learned import Learned

logger = logging.getLogger("scheduler")

FORMAT = "speculation-1"
MAX_FILES = 64  # the newest ones stay


class Kept(msgspec.Struct, frozen=True):
    key: str
    learned: Learned


def load(cache_folder: Path) -> dict[str, Learned]:
    """By key: see `Speculator`."""
    found: dict[str, Learned] = {}
    for path in _files(cache_folder)[-MAX_FILES:]:
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            continue
        found[kept.key] = kept.learned
    return found


def save(cache_folder: Path, known: Mapping[str, Learned], keys: Iterable[str]) -> None:
    """Write those of `keys`, and remove the oldest files. Another server may do the same: a file is replaced whole."""
    for key in keys:
        path = cache_folder / FORMAT / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        new = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(msgspec.json.encode(Kept(key, known[key])))
            new.replace(path)
        except OSError as error:
            logger.warning("cannot keep what speculation learned: %s", error)
            with suppress(OSError):
                new.unlink()
    for path in _files(cache_folder)[:-MAX_FILES]:
        with suppress(OSError):
            path.unlink()


def _files(cache_folder: Path) -> list[Path]:
    """Oldest first."""
    try:
        return sorted((cache_folder / FORMAT).glob("*.json"), key=lambda path: path.stat().st_mtime)
    except OSError:  # another server removed one
        return []
