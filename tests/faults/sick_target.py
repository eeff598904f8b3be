"""A target that falls ill over certain words of a prompt: `python -m tests.faults.sick_target`.

It happens in the main loop as a step with such a word in a prefill row begins: what a fault in a kernel does, at a
known place. SICK_FOLDER is a folder of the test. Each fault adds a line to the file that is named after its word. A
word of ONCE does harm only while the file WORD.armed is there, which it takes: the request survives.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
}


def arm(folder: Path, word: str) -> None:
    (folder / f"{word}.armed").touch()


def num_faults(folder: Path, word: str) -> int:
    file = folder / word
    return file.read_text().count("\n") if file.exists() else 0


class SickTarget(target.Target):
    def __init__(self, settings: Settings, load_id: int = 0) -> None:
        super().__init__(settings, load_id)
        self._folder = Path(os.environ[FOLDER])
        self._tokenizer = Tokenizer.from_file(str(Path(settings.model) / "tokenizer.json"))

    def _begin(self, message: Step | Release, running: deque[Any]) -> None:
        if isinstance(message, Step):
            for row in message.prefills:
                self._read(self._tokenizer.decode(row.token_ids or []))
        super()._begin(message, running)

    def _read(self, text: str) -> None:
        for word, harm in (ALWAYS | ONCE).items():
            if word in text and (word in ALWAYS or self._is_armed(word)):
                with (self._folder / word).open("a") as file:
                    file.write(f"{os.getpid()}\n")
                harm()

    def _is_armed(self, word: str) -> bool:
        try:
            (self._folder / f"{word}.armed").unlink()
        except FileNotFoundError:
            return False
        return True


if __name__ == "__main__":
    target.Target = SickTarget  # type: ignore[misc]  # main() makes it
    code = target.main()
    sys.stderr.flush()
    os._exit(code)
