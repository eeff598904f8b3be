"""What requests that come cost beside the rounds of those that decode, with drafts and without.

A step with a prompt, and the next round, take longer with drafts: nothing is pipelined, and the drafter has the prompt
to take in. With short answers that decides whether drafts pay, and rounds without prompts do not show it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from scheduler.round_time import capped_mean

MEMORY_TOKENS = 4096  # committed tokens over which requests are counted
NUM_SAMPLES = 16
MAX_OVER_MEDIAN = 2.0
HALF_LIFE_S = 60.0  # of what was measured of the mode that is not used: it is tried again
MIN_CHUNK = 32  # prompt tokens of a step that tells what one costs
PACE_CREEP = 1.01  # each such step, so that a pace that holds no more is left
MAX_UNSTEADY = 4  # rounds after the last prompt


@dataclass
class _Episode:
    """Steps with prompts and the rounds behind them, up to the next one that is as those before."""

    is_drafting: bool
    num_started: int = 0
    num_rounds: int = 0  # since the last prompt
    extra_s: float = 0.0


class ArrivalCosts:
    """How many requests come, and what each costs, kept apart by whether drafts were wanted when it came."""

    def __init__(self) -> None:
        self._num_started = self._num_tokens = 0.0  # of late
        self._samples: dict[bool, deque[float]] = {mode: deque(maxlen=NUM_SAMPLES) for mode in (False, True)}
        self._means = {False: 0.0, True: 0.0}
        self._measured = {False: 0.0, True: 0.0}  # `now` of the newest sample
        self._episode: _Episode | None = None
        self._was_drafting: bool | None = None  # of the last round, if that was as the one before
        self._pace_s: float | None = None  # of a prompt token: the least there was

    @property
    def per_token(self) -> float:
        """Requests that begin for each committed token."""
        return self._num_started / self._num_tokens if self._num_tokens else 0.0

    def seconds(self, is_drafting: bool, now: float) -> float:
        """Of one request; 0 where nothing was measured: so it will be."""
        mean = self._means[is_drafting]
        return mean * float(0.5 ** ((now - self._measured[is_drafting]) / HALF_LIFE_S)) if mean else 0.0

    def recall(self, plain_s: float, drafted_s: float, now: float) -> None:
        """What a request cost before the start."""
        self._means = {False: plain_s, True: drafted_s}
        self._measured = {False: now, True: now}

    def prefilled(
        self,
        is_drafting: bool,
        num_started: int,
        num_prompt_tokens: int,
        num_tokens: int,
        elapsed_s: float,
        token_s: float,
    ) -> None:
        """A step with prompts gave its result.

        Args:
            num_started: requests that have their first token of it.
            num_prompt_tokens: that it computed.
            num_tokens: that it committed, those not counted.
            elapsed_s: since the result before it.
            token_s: seconds of a token in rounds without prompts.
        """
        self._count(num_started, num_tokens)
        extra_s = elapsed_s - num_tokens * token_s
        if num_prompt_tokens >= MIN_CHUNK and extra_s > 0:
            pace_s = extra_s / num_prompt_tokens
            self._pace_s = pace_s if self._pace_s is None else min(PACE_CREEP * self._pace_s, pace_s)
        episode, self._episode = self._episode, None
        if episode is None and self._was_drafting is is_drafting:  # else it would be told what the change cost
            episode = _Episode(is_drafting)
        self._was_drafting = None
        if episode is not None and episode.is_drafting == is_drafting:
            episode.num_started += num_started
            episode.num_rounds = 0
            episode.extra_s += extra_s - num_prompt_tokens * (self._pace_s or 0.0)
            self._episode = episode

    def decoded(
        self, is_drafting: bool, num_tokens: int, elapsed_s: float, token_s: float, is_steady: bool, now: float
    ) -> None:
        """A step without prompts gave its result; `is_steady`: it is of one kind with the one before."""
        self._count(0, num_tokens)
        self._was_drafting = is_drafting if is_steady else None
        episode = self._episode
        if episode is None:
            return
        if episode.is_drafting == is_drafting and not is_steady and episode.num_rounds < MAX_UNSTEADY:
            episode.num_rounds += 1
            episode.extra_s += elapsed_s - num_tokens * token_s
            return
        self._episode = None
        if episode.is_drafting == is_drafting and episode.num_started:
            self._add(is_drafting, max(0.0, episode.extra_s / episode.num_started), now)

    def _add(self, is_drafting: bool, seconds: float, now: float) -> None:
        samples = self._samples[is_drafting]
        samples.append(seconds)
        self._means[is_drafting] = capped_mean(samples, MAX_OVER_MEDIAN)
        self._measured[is_drafting] = now

    def _count(self, num_started: int, num_tokens: int) -> None:
        kept = max(0.0, 1 - num_tokens / MEMORY_TOKENS)
        self._num_started = kept * self._num_started + num_started
        self._num_tokens = kept * self._num_tokens + num_tokens
