"""A small parent that restarts its child: `python -m shared.supervise NAME -- COMMAND...`.

honcho stops everything when one line of the Procfile ends, so each line runs under this parent. It restarts the child
with growing back-off and gives up, with a non-zero exit, after `max_early_deaths` deaths in a row within
`EARLY_DEATH_S` of their start. A worker that was ready for work died of something else, perhaps of a request, and
however often that happens there will be a new one. Exit code 78 (a bad setting or model) is final at once: another
try cannot help.

SIGHUP restarts the child in order (`tandem restart`). SIGUSR2 ends the child and starts
none until SIGHUP. SIGUSR1 is passed on and says that the child will end by itself
once its work is done (`frontend/drain.py`): whatever ends it then, it is not started again. A child that no longer
touches its beat file (`shared/beat.py`) hangs, and is killed. A child finds the exit code of the one before it in the
environment variable LAST_EXIT.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from shared import config
from shared.beat import PATIENCE, Watch, beat_path
from shared.errors import BadConfig

EXIT_CONFIG = 78  # sysexits.h EX_CONFIG
MAX_EARLY_DEATHS = 5
EARLY_DEATH_S = 20.0
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 4.0)
STOP_GRACE_S = 4.0
LOOK_S = 1.0
PAUSED_S = 0.1  # between two looks whether the child is to be started again
LAST_EXIT = "SUPERVISE_LAST_EXIT"
# What MKL's OpenMP keeps in shared memory for each process, and removes only where that ends in order: no killed one
# does, nor a worker, whose device's threads are not waited for.
OPENMP_FILE = "/dev/shm/__KMP_REGISTERED_LIB_{pid}_{uid}"


def last_exit() -> int | None:
    """How the process before this one ended, where a supervisor knows."""
    text = os.environ.get(LAST_EXIT, "")
    return int(text) if text.lstrip("-").isdigit() else None


def _die_with_parent() -> None:
    """On Linux, a process whose parent is killed gets SIGTERM instead of living on as an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _is_orphan() -> bool:
    """Is honcho gone already? It ends without its processes when it is told to end while it starts them."""
    return "HONCHO_PROCESS_NAME" in os.environ and os.getppid() == 1


def _remove_shared_memory(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(OPENMP_FILE.format(pid=pid, uid=os.getuid()))


class Supervisor:
    """Runs `command` until it ends cleanly, is told to stop, or dies early too often.

    Args:
        watch: tells whether the child hangs; None: nobody looks.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        sleep: Callable[[float], None] = time.sleep,
        watch: Watch | None = None,
        max_early_deaths: int = MAX_EARLY_DEATHS,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.num_early_deaths = 0
        self._num_quick_deaths = 0  # in a row, ready or not: they make the pauses longer
        self._sleep = sleep
        self._watch = watch
        self._max_early_deaths = max_early_deaths
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._restarting = False
        self._draining = False
        self._paused = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Pass SIGTERM on; a child that has not ended STOP_GRACE_S later is killed."""
        self._stopping = True
        self._end_child(signal.SIGTERM)

    def restart(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Have the child end and start a new one at once. It gets SIGHUP, so that it can tell this from a stop."""
        self._restarting, self._paused = True, False
        self._end_child(signal.SIGHUP)

    def pause(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Have the child end, and start no other one until `restart`."""
        self._paused = True
        self._end_child(signal.SIGTERM)

    def drain(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Pass SIGUSR1 on and wait for the child to end, however long it takes."""
        self._draining = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGUSR1)

    def _end_child(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
            signal.signal(signal.SIGALRM, self._kill)
            signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S)

    def _kill(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()

    def run(self) -> int:
        """The exit code for our own process: 0 only if we were told to stop or drain, or the child ended with 0."""
        environment = dict(os.environ)
        environment.pop(LAST_EXIT, None)
        while not self._stopping and not self._draining:
            if self._paused:
                time.sleep(PAUSED_S)
                continue
            started = time.monotonic()
            if self._watch is not None:
                self._watch.begin()
            self._restarting = False
            self._child = subprocess.Popen(self.command, preexec_fn=_die_with_parent, env=environment)
            code = self._wait(self._child)
            _remove_shared_memory(self._child.pid)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            if self._stopping or self._draining or (code == 0 and not (self._restarting or self._paused)):
                return 0
            environment[LAST_EXIT] = "0" if self._restarting or self._paused else str(code)
            if self._paused:
                self._say(f"{self.name} ended, as it was told")
                continue
            if self._restarting:
                self._say(f"{self.name} is started again, as it was told")
                continue
            lived = time.monotonic() - started
            if code == EXIT_CONFIG:
                self._say(f"{self.name} refused to start; see its message above")
                return EXIT_CONFIG
            is_quick = lived < EARLY_DEATH_S
            self._num_quick_deaths = self._num_quick_deaths + 1 if is_quick else 1
            if self._watch is not None and self._watch.was_ready:
                self.num_early_deaths = 0
            else:
                self.num_early_deaths = self.num_early_deaths + 1 if is_quick else 1
            if self.num_early_deaths >= self._max_early_deaths:
                self._say(f"{self.name} died {self.num_early_deaths} times within {EARLY_DEATH_S:.0f} s; giving up")
                return 1
            pause = BACKOFF_S[min(self._num_quick_deaths, len(BACKOFF_S)) - 1]
            self._say(f"{self.name} ended with {code} after {lived:.1f} s; starting it again in {pause} s")
            self._sleep(pause)
        return 0

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """The child's exit code; one that hangs is killed."""
        if self._watch is None:
            return child.wait()
        ended = threading.Event()
        looking = threading.Thread(target=self._look, args=(child, self._watch, ended), daemon=True)
        looking.start()
        try:
            return child.wait()  # with a time limit it would wake 20 times a second, in each of four idle supervisors
        finally:
            ended.set()
            looking.join()

    def _look(self, child: subprocess.Popen[bytes], watch: Watch, ended: threading.Event) -> None:
        """Kill the child when it hangs. Runs in a thread that takes no signals: those are to wake `wait`."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not ended.wait(LOOK_S):
            if watch.is_silent():
                self._say(f"{self.name} hangs; killing it")
                child.kill()

    def _say(self, text: str) -> None:
        try:
            print(f"supervise: {text}", file=sys.stderr, flush=True)
        except OSError:
            return  # nobody reads, or the disk is full: no reason to stop


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 3 or arguments[1] != "--":
        print("usage: python -m shared.supervise NAME -- COMMAND...", file=sys.stderr)
        return 2
    name, command = arguments[0], arguments[2:]
    try:
        settings = config.load()
        folder = config.prepare_run_folder(settings)
    except BadConfig as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    watch = Watch(beat_path(settings, name), round(PATIENCE * settings.heartbeat_timeout_s / LOOK_S) + 1)
    supervisor = Supervisor(name, command, watch=watch, max_early_deaths=settings.max_early_deaths)
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    signal.signal(signal.SIGHUP, supervisor.restart)
    signal.signal(signal.SIGUSR1, supervisor.drain)
    signal.signal(signal.SIGUSR2, supervisor.pause)
    _die_with_parent()
    if _is_orphan():
        return 0
    pid_file = folder / f"{name}.pid"
    pid_file.write_text(str(os.getpid()))
    try:
        return supervisor.run()
    finally:
        pid_file.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
