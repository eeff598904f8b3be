"""Fetches what a request's media URL points to."""

from __future__ import annotations

from shared.config import Settings
from shared.errors import InvalidRequest


async def fetch(url: str, settings: Settings, *, param: str | None = None) -> bytes:
    """The bytes behind an http, https or file URL, or a local path.

    Raises:
        InvalidRequest: always, for now: fetching needs guards against requests that look around in private networks.
    """
    raise InvalidRequest("fetching URLs and files is not supported; send the data itself (data: URI)", param=param)
