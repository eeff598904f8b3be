"""API keys: who may call, and whose share of the engine a call takes.

Keys come from the environment (`TANDEM_API_KEYS`, comma separated) and from a file (`TANDEM_API_KEYS_FILE`), one a
line, with an optional weight after it: `key 2` gets twice the share of the engine when keys compete. The engine knows a
key's tenant only: the first 16 digits of its SHA-256.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import msgspec

from shared.config import Settings
from shared.errors import BadConfig

MIN_KEY_CHARS = 4


class ApiKey(msgspec.Struct, frozen=True):
    key: bytes
    weight: float = 1.0

    @property
    def tenant(self) -> str:
        return hashlib.sha256(self.key).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"ApiKey(tenant={self.tenant!r}, weight={self.weight})"  # never the key


def load_keys(settings: Settings) -> list[ApiKey]:
    """All keys that may call; empty: no authentication.

    Raises:
        BadConfig: the file cannot be read, is open to others, or has a line that is not `key [weight]`.
    """
    keys = [ApiKey(key.strip().encode()) for key in settings.api_keys.split(",") if key.strip()]
    if settings.api_keys_file:
        keys += _read(Path(settings.api_keys_file).expanduser())
        if not keys:
            raise BadConfig("TANDEM_API_KEYS_FILE holds no key: the server would be open to everybody")
    if settings.admin_key and settings.admin_key.encode() in [k.key for k in keys]:
        raise BadConfig("TANDEM_ADMIN_KEY is also an API key; it must be another one")
    return keys


def _read(path: Path) -> list[ApiKey]:
    try:
        if path.stat().st_mode & 0o077:
            raise BadConfig(f"TANDEM_API_KEYS_FILE {path} can be read by others; make it 0600")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"TANDEM_API_KEYS_FILE {path} cannot be read: {type(error).__name__}") from error
    return [_parse(line, number, path) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]


def _parse(line: str, number: int, path: Path) -> ApiKey:
    """The message names the line, never what stands there."""
    parts = line.split()
    try:
        weight = float(parts[1]) if len(parts) == 2 else 1.0
    except ValueError:
        weight = math.nan
    if len(parts) > 2 or len(parts[0]) < MIN_KEY_CHARS or not 0.01 <= weight <= 100:
        raise BadConfig(f"{path}, line {number}: not a key of {MIN_KEY_CHARS}+ characters and a weight 0.01..100")
    return ApiKey(parts[0].encode(), weight)
