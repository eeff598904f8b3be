"""A small parent that restarts its child: `python -m shared.supervise NAME -- COMMAND...`.

honcho stops everything when one line of the Procfile ends, so each line runs under this parent. It restarts the child
with growing back-off and gives up, with a non-zero exit, after `MAX_EARLY_DEATHS` deaths in a row within
`EARLY_DEATH_S` of their start. Exit code 78 (a bad setting or model) is final at once: another try cannot help.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

EXIT_CONFIG = 78  # sysexits.h EX_CONFIG
MAX_EARLY_DEATHS = 5
EARLY_DEATH_S = 20.0
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 4.0)
STOP_GRACE_S = 4.0


def _die_with_parent() -> None:
    """On Linux, a child whose supervisor is killed gets SIGTERM instead of living on as an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Supervisor:
    """Runs `command` until it ends cleanly, is told to stop, or dies early too often."""

    def __init__(self, name: str, command: Sequence[str], sleep: Callable[[float], None] = time.sleep) -> None:
        self.name = name
        self.command = list(command)
        self.num_early_deaths = 0
        self._sleep = sleep
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Pass SIGTERM on; a child that has not ended STOP_GRACE_S later is killed."""
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            signal.signal(signal.SIGALRM, self._kill)
            signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S)

    def _kill(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()

    def run(self) -> int:
        """The exit code for our own process: 0 only if we were told to stop or the child ended with 0."""
        while not self._stopping:
            started = time.monotonic()
            self._child = subprocess.Popen(self.command, preexec_fn=_die_with_parent)
            code = self._child.wait()
            if self._stopping or code == 0:
                return 0
            lived = time.monotonic() - started
            if code == EXIT_CONFIG:
                self._say(f"{self.name} refused to start; see its message above")
                return EXIT_CONFIG
            self.num_early_deaths = self.num_early_deaths + 1 if lived < EARLY_DEATH_S else 1
            if self.num_early_deaths >= MAX_EARLY_DEATHS:
                self._say(f"{self.name} died {self.num_early_deaths} times within {EARLY_DEATH_S:.0f} s; giving up")
                return 1
            pause = BACKOFF_S[min(self.num_early_deaths, len(BACKOFF_S)) - 1]
            self._say(f"{self.name} ended with {code} after {lived:.1f} s; starting it again in {pause} s")
            self._sleep(pause)
        return 0

    def _say(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 3 or arguments[1] != "--":
        print("usage: python -m shared.supervise NAME -- COMMAND...", file=sys.stderr)
        return 2
    supervisor = Supervisor(arguments[0], arguments[2:])
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
