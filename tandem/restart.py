"""`tandem restart target|drafter|scheduler`: tells the process's supervisor, found by its file in the run folder."""

from __future__ import annotations

import signal

from shared.config import Settings
from shared.supervisors import tell

ROLES = ("target", "drafter", "scheduler")


def restart(role: str, settings: Settings) -> int:
    """Have the process replaced by a new one; streams pause and go on. Returns the supervisor's process id.

    Raises:
        Unavailable: no server runs with these settings (the run folder goes by the port).
    """
    return tell(role, signal.SIGHUP, settings)
