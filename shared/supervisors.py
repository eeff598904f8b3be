"""Telling a process's supervisor something: it is found by its file in the run folder and told by a signal."""

from __future__ import annotations

import signal

import psutil

from shared.config import Settings
from shared.errors import Unavailable


def tell(role: str, number: signal.Signals, settings: Settings) -> int:
    """Send the supervisor of `role` a signal of those in shared/supervise.py. Returns its process id.

    Raises:
        Unavailable: no server runs with these settings (the run folder goes by the port).
    """
    file = settings.run_folder / f"{role}.pid"
    try:
        supervisor = psutil.Process(int(file.read_text()))
        command = supervisor.cmdline()
        if "shared.supervise" not in command or role not in command:
            raise Unavailable(f"{file} is a leftover of a server that is gone")
        supervisor.send_signal(number)
    except (OSError, ValueError, psutil.Error) as error:
        raise Unavailable(f"no server runs with the run folder {settings.run_folder}") from error
    return supervisor.pid


def has_child(supervisor: int) -> bool:
    """Whether the process that a supervisor watches runs."""
    try:
        return bool(psutil.Process(supervisor).children())
    except psutil.Error:
        return False
