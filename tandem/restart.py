"""`tandem restart target|drafter|scheduler`: tells the process's supervisor, found by its file in the run folder."""

from __future__ import annotations

import signal

import psutil

from shared.config import Settings
from shared.errors import Unavailable

ROLES = ("target", "drafter", "scheduler")


def restart(role: str, settings: Settings) -> int:
    """Have the process replaced by a new one; streams pause and go on. Returns the supervisor's process id.

    Raises:
        Unavailable: no server runs with these settings (the run folder goes by the port).
    """
    file = settings.run_folder / f"{role}.pid"
    try:
        supervisor = psutil.Process(int(file.read_text()))
        command = supervisor.cmdline()
        if "shared.supervise" not in command or role not in command:
            raise Unavailable(f"{file} is a leftover of a server that is gone")
        supervisor.send_signal(signal.SIGHUP)
    except (OSError, ValueError, psutil.Error) as error:
        raise Unavailable(f"no server runs with the run folder {settings.run_folder}") from error
    return supervisor.pid
