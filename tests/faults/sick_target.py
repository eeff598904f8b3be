"""A target that falls ill over certain words of a prompt: `python -m tests.faults.sick_target`.

It happens in the main loop as a step with such a word in a prefill row begins: what a fault in a kernel does, at a
known place. SICK_FOLDER is a folder of the test. Each fault adds a line to the file that is named after its word, with
the position where the row begins. A word of ONCE does harm only while the file WORD.armed is there, which it takes: the
request survives. STOP is SIGSTOP, so that the test can act while a prompt is half computed. WRITE, which stands in no
prompt, is `kill -9` in the middle of a block's file on SSD.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tokenizers import Tokenizer

from shared.config import Settings
from shared.messages import Release, Step
from workers import target

FOLDER = "SICK_FOLDER"


def _raise() -> None:
    raise RuntimeError("a step that cannot be computed")


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


ALWAYS: dict[str, Callable[[], object]] = {"SEGFAULT": _signal(signal.SIGSEGV), "ABORT": os.abort, "RAISE": _raise}
ONCE: dict[str, Callable[[], object]] = {
    "HANG": threading.Event().wait,  # the main loop only: the heartbeat's thread goes on
    "KILL": _signal(signal.SIGKILL),
    "STOP": _signal(signal.SIGSTOP),
}
WATCHED = "WATCHED"  # no harm, a line for each row all the same
WRITE = "WRITE"


def arm(folder: Path, word: str) -> None:
    (folder / f"{word}.armed").touch()


def faults(folder: Path, word: str) -> list[int]:
    """Where the rows began over which it happened."""
    file = folder / word
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_armed(folder: Path, word: str) -> bool:
    try:
        (folder / f"{word}.armed").unlink()
    except FileNotFoundError:
        return False
    return True


def note(folder: Path, word: str, start: int = 0) -> None:
    with (folder / word).open("a") as file:
        file.write(f"{start}\n")


class SickTarget(target.Target):
    def __init__(self, settings: Settings, load_id: int = 0) -> None:
        super().__init__(settings, load_id)
        self._folder = Path(os.environ[FOLDER])
        assert self.archiver is not None, "the fault in writing needs an archive"
        self._harm_writing()
        self._tokenizer = Tokenizer.from_file(str(Path(settings.model) / "tokenizer.json"))

    def _begin(self, message: Step | Release, running: deque[Any]) -> None:
        if isinstance(message, Step):
            for row in message.prefills:
                self._read(self._tokenizer.decode(row.token_ids or []), row.start)
        super()._begin(message, running)

    def _read(self, text: str, start: int) -> None:
        if WATCHED in text:
            note(self._folder, WATCHED, start)
        for word, harm in (ALWAYS | ONCE).items():
            if word in text and (word in ALWAYS or is_armed(self._folder, word)):
                note(self._folder, word, start)
                harm()

    def _harm_writing(self) -> None:
        from workers.cache import archive

        def open_and_die(descriptor: int, mode: str) -> IO[Any]:
            file = open(descriptor, mode)  # noqa: SIM115 - the caller closes it
            if is_armed(self._folder, WRITE):
                file.write(b"the beginning of a block")
                file.flush()
                note(self._folder, WRITE)
                os.kill(os.getpid(), signal.SIGKILL)
            return file

        archive.open = open_and_die  # type: ignore[attr-defined]


if __name__ == "__main__":
    target.Target = SickTarget  # type: ignore[misc]  # main() makes it
    code = target.main()
    sys.stderr.flush()
    os._exit(code)
