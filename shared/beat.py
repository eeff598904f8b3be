"""A sign of life that a process leaves for its supervisor: the time of a file in the run folder.

Heartbeats over sockets tell the scheduler; this tells the parent, which can replace a process that hangs even when the
scheduler is the one that does.
"""

from __future__ import annotations

import os
from pathlib import Path

from shared.config import Settings

PATIENCE = 2.0  # times `heartbeat_timeout_s`: the scheduler has noticed before, and recovers when the new process comes


def beat_path(settings: Settings, name: str) -> Path:
    return settings.run_folder / f"{name}.beat"


def ready_path(beat: Path) -> Path:
    """Stands beside the beat once the process has been ready for work."""
    return beat.with_suffix(".ready")


class Beat:
    """Touches the files. An error is ignored: on a full disk the process goes on, unwatched at worst."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._path = beat_path(settings, name)

    def touch(self) -> None:
        try:
            self._path.touch(mode=0o600)
            os.utime(self._path)
        except OSError:
            return

    def ready(self) -> None:
        """This process can start: should it die from now on, that is not why."""
        try:
            ready_path(self._path).touch(mode=0o600)
        except OSError:
            return


class Watch:
    """The supervisor's side. Counts its own looks instead of reading a clock: a machine that slept is not a hang."""

    def __init__(self, path: Path, max_looks: int) -> None:
        self._path = path
        self._max_looks = max_looks
        self._last: int | None = None
        self._num_same = 0

    def begin(self) -> None:
        """A new child: it is watched from its first beat on."""
        self._path.unlink(missing_ok=True)
        ready_path(self._path).unlink(missing_ok=True)
        self._last, self._num_same = None, 0

    @property
    def was_ready(self) -> bool:
        return ready_path(self._path).exists()

    def is_silent(self) -> bool:
        """To be called once per second or so: whether the last `max_looks` calls saw no new beat."""
        try:
            beat = self._path.stat().st_mtime_ns
        except OSError:
            return False
        self._num_same = self._num_same + 1 if beat == self._last else 0
        self._last = beat
        return self._num_same >= self._max_looks
