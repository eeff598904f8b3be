"""Which requests may have brought the target down, and when that is certain enough to fail one of them.

Every sequence that the target worked on when it died is a suspect until it has got a few tokens from the next one. Only
one suspect at a time is in the target's hands, so a second death points at one request. A death that comes from outside
(`kill -9`, the kernel) says less than one of the process's own making: it takes twice as many.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable

from scheduler.sequence import Sequence

OWN_DEATH = 2  # strikes of a crash, an exception, a step that did not end
OUTER_DEATH = 1  # of a signal that others sent, or of an unknown cause
RESTART = 0  # of an orderly end
MAX_STRIKES = 4
NUM_PROVING_TOKENS = 2  # one from a prefill, one from a decode step

POISON = "the model's process died while it worked on this request, again and again; the request is given up"


def strikes_of(last_exit: int | None) -> int:
    """Strikes for a worker's exit code as its supervisor saw it (negative: a signal); None: not known."""
    if last_exit in (0, -signal.SIGTERM, -signal.SIGHUP):
        return RESTART
    if last_exit is None or last_exit == -signal.SIGKILL:
        return OUTER_DEATH
    return OWN_DEATH


class Suspects:
    """Counts in `Sequence.num_strikes`; this holds the sequences whose count is not zero."""

    def __init__(self) -> None:
        self._suspects: list[Sequence] = []
        self._silent: list[Sequence] = []  # what a target had in hand that fell silent: how it ended is not known yet

    def __len__(self) -> int:
        return len(self._suspects)

    def blame(self, sequences: Iterable[Sequence], strikes: int, is_silent: bool = False) -> list[Sequence]:
        """The target died with these in its hands; those that are certain enough to be the cause.

        Args:
            is_silent: only its heartbeats tell so; `explain` corrects the strikes when the cause is known.
        """
        blamed = {id(s): s for s in sequences if s.finish_reason is None}.values() if strikes else ()
        self._silent = list(blamed) if is_silent else []
        for sequence in blamed:
            if not sequence.num_strikes:
                self._suspects.append(sequence)
            sequence.num_strikes += strikes
            sequence.num_proving_tokens = sequence.num_output_tokens + NUM_PROVING_TOKENS
        return self._certain()

    def explain(self, last_exit: int | None) -> list[Sequence]:
        """The next process tells how the one that fell silent had ended; those that are certain enough then."""
        more = strikes_of(last_exit) - OUTER_DEATH
        for sequence in self._silent:
            if sequence.num_strikes:
                sequence.num_strikes += more
        self._silent = []
        self._suspects = [s for s in self._suspects if s.num_strikes]
        return self._certain()

    def _certain(self) -> list[Sequence]:
        return [s for s in self._suspects if s.num_strikes >= MAX_STRIKES]

    def choose(self, in_flight: Iterable[Sequence], waiting_head: Sequence | None) -> Sequence | None:
        """The one suspect that the next step may work on: one that has begun, else the head of the queue."""
        for sequence in in_flight:
            if sequence.num_strikes and sequence.finish_reason is None:
                return sequence
        running = next((s for s in self._suspects if s.is_running), None)
        return running or waiting_head

    def clear_proven(self) -> None:
        for sequence in self._suspects:
            if sequence.num_output_tokens >= sequence.num_proving_tokens:
                sequence.num_strikes = 0
        self._suspects = [s for s in self._suspects if s.num_strikes]

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        self._silent = [s for s in self._silent if s is not sequence]
        if sequence.num_strikes:
            self._suspects.remove(sequence)
