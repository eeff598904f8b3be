"""What a client does to a server on its own machine, beside HTTP."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from shared import config
from shared.errors import InvalidRequest, Unavailable
from tandem import restart as supervisor

_OWN = frozenset({"127.0.0.1", "localhost", "::1"})


def restart(url: str, role: str) -> int:
    """As `tandem restart`, for the server at `url`.

    Raises:
        InvalidRequest: there is no such role.
        Unavailable: the server is on another machine, or none runs there.
    """
    if role not in supervisor.ROLES:
        raise InvalidRequest(f"role: {role!r} is none of {', '.join(supervisor.ROLES)}", param="role")
    parts = urlsplit(url)
    if parts.hostname not in _OWN:
        raise Unavailable(f"restart: only on the server's own machine, which {parts.hostname} is not known to be")
    return supervisor.restart(role, msgspec.structs.replace(config.load(), port=parts.port or 80))
