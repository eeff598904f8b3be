"""What a client keeps for the server: reasoning and summaries, packed and signed.

The signature is an HMAC with a key of this server over the content, its kind and the API key's tenant, so nobody can
make the model read words of its own that it never said. It hides nothing: clients are shown the same text anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import zlib
from typing import Literal

Kind = Literal["reasoning", "compaction"]

_VERSION = b"\x01"
_MAC_BYTES = 32


def seal(key: bytes, tenant: str, kind: Kind, text: str) -> str:
    packed = zlib.compress(text.encode("utf-8", "replace"))
    return base64.urlsafe_b64encode(_VERSION + _mac(key, tenant, kind, packed) + packed).decode("ascii")


def unseal(key: bytes, tenant: str, kind: Kind, sealed: str) -> str | None:
    """The text, or None where another server, key or kind made it, or somebody changed it."""
    try:
        raw = base64.urlsafe_b64decode(sealed.encode("ascii"))
    except (binascii.Error, ValueError):  # UnicodeEncodeError is a ValueError
        return None
    mac, packed = raw[1 : 1 + _MAC_BYTES], raw[1 + _MAC_BYTES :]
    if raw[:1] != _VERSION or not hmac.compare_digest(mac, _mac(key, tenant, kind, packed)):
        return None
    return zlib.decompress(packed).decode()  # ours, so it is well-formed


def _mac(key: bytes, tenant: str, kind: Kind, packed: bytes) -> bytes:
    head = b"\0".join((_VERSION, tenant.encode(), kind.encode(), b""))
    return hmac.digest(key, head + packed, hashlib.sha256)
