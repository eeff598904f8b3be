"""Runs every line of the Procfile under honcho: `python -m tandem.processes`, which `tandem serve` becomes.

SIGTERM lets live requests finish: the frontend is told to drain, and everything ends when it has. A second SIGTERM, and
Ctrl-C, end everything at once. Both are usual ways to end a server, so they are a success here; a process that gave up
keeps its own exit code.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from honcho.environ import parse_procfile
from honcho.manager import Manager

from shared import config, served
from shared.errors import BadConfig, Unavailable
from shared.supervise import EXIT_CONFIG
from shared.supervisors import tell

PROCFILE = Path(__file__).resolve().parent.parent / "Procfile"
TERMINATED = 128 + signal.SIGTERM  # honcho's exit codes for the signals that it knows
ORDERLY = frozenset({128 + signal.SIGINT, TERMINATED})


class Processes(Manager):  # type: ignore[misc]  # honcho has no annotations
    """honcho's manager, which ends everything at once, but for the first SIGTERM."""

    def __init__(self, settings: config.Settings) -> None:
        super().__init__()
        self._settings = settings
        self._is_draining = False

    def terminate(self) -> None:
        """Called by honcho's signal handler (which has set `returncode`) and as soon as a process has ended."""
        if self.returncode == TERMINATED and not self._is_draining:
            self._is_draining = True
            if self._drain():
                return
        super().terminate()

    def _drain(self) -> bool:
        """Tell the frontend; False: there is none, so nothing has to be waited for."""
        try:
            tell("frontend", signal.SIGUSR1, self._settings)
        except Unavailable:
            return False
        return True


def main() -> int:
    try:
        settings = config.load()
    except BadConfig as error:
        print(f"tandem: {error}", file=sys.stderr)
        return EXIT_CONFIG
    served.path(settings).unlink(missing_ok=True)  # what a server before this one was told to serve
    processes = Processes(settings)
    for name, command in parse_procfile(PROCFILE.read_text()).processes.items():
        processes.add_process(name, command, cwd=str(PROCFILE.parent))
    processes.loop()
    code = processes.returncode
    return 0 if code in ORDERLY else int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
