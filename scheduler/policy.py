"""How many tokens to draft: the number that commits the most tokens per second, none included.

What counts is measured whole: the time from one result to the next, drafting, sending and waiting included, for each
batch size and k. Where a choice was never tried at this batch size, costs of its parts stand in, corrected by what
rounds of its kind took elsewhere. The other choices are tried again now and then, plain decoding too, with rounds that
may cost a fixed small share of the time: so a wrong estimate is found out, and finding out never costs more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PRIOR = 0.8  # acceptance assumed before anything was seen: hopeful, so that it is measured at once
ACCEPT_WEIGHT = 0.004  # of one verified row in the moving average of acceptance
LIKE_BEFORE = 16  # tests of a position that weigh as much as what is known of the one before it
WINDOW = 48  # rounds that a time is the mean of
MAX_OVER_MEDIAN = 1.4
EXCESS_WEIGHT = 0.05  # of one round in the moving average of measured over modelled time
MAX_EXCESS = 4.0
YIELD_WEIGHT, MAX_YIELD_WEIGHT = 0.005, 0.05  # of one row, of one round
MIN_GAIN = 1.01  # drafting must promise this much over plain decoding
TRIAL_SHARE = 0.01  # of the time may be lost by trying what is not the best choice
TRIAL_ROUNDS = 4  # of a trial, the first of which is not measured: it fills or empties the pipeline
TRIAL_ROWS, FIRST_TRIAL_ROWS = 12, 32  # where rounds have few rows there are more of them
CLOSE_PLAIN = 0.6  # as CLOSE, for the first trial of plain decoding, by which everything else is judged
CLOSE, CLOSE_INTERVAL = 0.88, 160  # a choice that is nearly as good costs little to try, so often (in results)
MIN_TRIAL_INTERVAL = 24  # results between two trials
TRIAL_CHECK = 4  # results between two looks at whether a trial is due
FIRST_TRIAL_AFTER = 12  # results at a batch size where the best other choice was never measured
MAX_TRIAL_INTERVAL_S = 60.0
LOST = 0.75  # a trial ends early where its rounds promise less than this share of the best
PLAUSIBLE = 0.4  # a draft length that promises less than this share of the best waits longer for its first trial
NUM_CERTAIN = 4  # rounds until a time is an average of its own

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def size_of(batch: int) -> int:
    """Batch sizes that are measured together."""
    return _SIZES[min(bisect_left(_SIZES, batch), len(_SIZES) - 1)]


class AcceptanceRates:
    """Moving averages of the chance that draft j (0-based) is accepted once those before it were."""

    def __init__(self, max_draft_tokens: int) -> None:
        self._rates = [PRIOR] * max(1, max_draft_tokens)
        self._seen = [0] * max(1, max_draft_tokens)

    def add(self, num_drafts: int, num_accepted: int) -> None:
        for j in range(min(num_drafts, num_accepted + 1, len(self._rates))):
            self._seen[j] += 1
            weight = max(ACCEPT_WEIGHT, 1 / (self._seen[j] + 1))
            self._rates[j] += weight * ((1.0 if j < num_accepted else 0.0) - self._rates[j])

    def expected_tokens(self, num_drafts: int) -> float:
        """Tokens that one row commits per step: 1 + a1 + a1 a2 + ...

        A position that was seldom tested counts as like the one before it.
        """
        total, chance, before = 1.0, 1.0, self._rates[0]
        for rate, seen in zip(self._rates[:num_drafts], self._seen, strict=False):
            seen = min(seen, round(1 / ACCEPT_WEIGHT))
            before = (seen * rate + LIKE_BEFORE * before) / (seen + LIKE_BEFORE)
            chance *= before
            total += chance
        return total


class RoundTime:
    """Mean of the last rounds; one that took much longer was somebody else's turn, or a compilation, and is cut."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self.num = 0
        self.value = 0.0

    def add(self, seconds: float) -> None:
        self.num += 1
        self._last.append(seconds)
        most = MAX_OVER_MEDIAN * sorted(self._last)[(len(self._last) - 1) // 2]
        self.value = sum(min(s, most) for s in self._last) / len(self._last)


@dataclass
class Trial:
    """Rounds with another k than the best one."""

    k: int
    rounds_left: int
    seconds: float = 0.0
    num_tokens: int = 0


class Policy:
    """Args:
    modelled_s: (batch, k) -> seconds of a round from the costs of its parts; 0 while nothing is known.
    expected_tokens: k -> tokens that a row commits in a round.
    """

    def __init__(self, modelled_s: Callable[[int, int], float], expected_tokens: Callable[[int], float]) -> None:
        self._modelled_s = modelled_s
        self._expected_tokens = expected_tokens
        self.forget()

    def forget(self) -> None:
        """Another target or drafter: nothing that was measured holds."""
        self._times: dict[tuple[int, int], RoundTime] = {}  # (batch size, k) -> seconds of a round
        self._tried: dict[tuple[int, int], float] = {}  # -> `_clock` when it was measured last
        self._excess = {True: 1.0, False: 1.0}  # drafted or plain: seconds measured over those modelled
        self._num_excess = {True: 0, False: 0}
        self._yield = 1.0  # committed tokens of drafted rounds over those expected
        self._trial: Trial | None = None
        self._last_trial: int | None = None  # the k of the one that ended, while rounds of it still come
        self._credit_s = 0.0  # what trials may still cost
        self._trial_cost: dict[tuple[int, int], float] = {}  # (batch size, k) -> seconds that its last trial lost
        self._num_since_trial: dict[int, int] = {}  # batch size -> results
        self._clock = 0.0  # seconds of all measured rounds

    # ------------------------------------------------ choosing

    def choose(self, batch: int, candidates: Sequence[int]) -> int:
        """k for the next step of `batch` rows: one of `candidates`, or 0. Changes nothing."""
        if self._trial is not None and self._trial.k in (0, *candidates):
            return self._trial.k
        return self.best(batch, candidates)

    def best(self, batch: int, candidates: Sequence[int]) -> int:
        """The k with the most expected tokens per second."""
        best, best_rate = 0, self.rate(batch, 0) * MIN_GAIN
        for k in candidates:
            rate = self.rate(batch, k)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def rate(self, batch: int, k: int) -> float:
        """Expected tokens per second."""
        seconds = self.round_s(batch, k)
        if seconds <= 0.0:
            return 0.0
        if k == 0:
            return batch / seconds
        return batch * max(1.0, self._expected_tokens(k) * self._yield) / seconds

    def round_s(self, batch: int, k: int) -> float:
        """Seconds of a round: as measured, or modelled and corrected while there is little to go by."""
        known = self._times.get((size_of(batch), k))
        if known is not None and known.num >= NUM_CERTAIN:
            return known.value
        modelled = self._modelled_s(batch, k) * self._excess[k > 0]
        if known is None:
            return modelled
        trust = known.num / NUM_CERTAIN
        return trust * known.value + (1 - trust) * modelled

    # ------------------------------------------------ measuring

    def finished(
        self, batch: int, k: int, num_tokens: int, elapsed_s: float, is_steady: bool, candidates: Sequence[int]
    ) -> None:
        """A decode-only step gave its result.

        Args:
            elapsed_s: since the result before it.
            is_steady: that result was one of the same k and much the same batch, so that this is a whole round.
        """
        if elapsed_s <= 0.0:
            return
        self._clock += elapsed_s
        if is_steady:
            self._measure(batch, k, num_tokens, elapsed_s)
        if self._trial is not None:
            self._go_on(self._trial, batch, k, num_tokens, elapsed_s, candidates)
        else:
            size = size_of(batch)
            self._count_rest(batch, k, num_tokens, elapsed_s, candidates)
            self._num_since_trial[size] = self._num_since_trial.get(size, 0) + 1
            self._credit_s += TRIAL_SHARE * elapsed_s
            self._trial = self._next_trial(batch, candidates)

    def _measure(self, batch: int, k: int, num_tokens: int, elapsed_s: float) -> None:
        key = size_of(batch), k
        self._times.setdefault(key, RoundTime()).add(elapsed_s)
        self._tried[key] = self._clock
        modelled = self._modelled_s(batch, k)
        if modelled > 0.0:
            excess = min(MAX_EXCESS, elapsed_s / modelled)
            self._num_excess[k > 0] += 1
            weight = max(EXCESS_WEIGHT, 1 / self._num_excess[k > 0])
            self._excess[k > 0] += weight * (excess - self._excess[k > 0])
        if k and batch:
            share = num_tokens / (batch * self._expected_tokens(k))
            self._yield += min(MAX_YIELD_WEIGHT, YIELD_WEIGHT * batch) * (share - self._yield)

    def _go_on(
        self, trial: Trial, batch: int, k: int, num_tokens: int, elapsed_s: float, candidates: Sequence[int]
    ) -> None:
        trial.seconds += elapsed_s
        trial.num_tokens += num_tokens
        trial.rounds_left -= k == trial.k
        if trial.rounds_left > 0 and trial.k in (0, *candidates) and not self._is_lost(trial, batch, candidates):
            return
        self._trial, self._last_trial = None, trial.k
        self._trial_cost[size_of(batch), trial.k] = 0.0
        self._charge(batch, trial.k, trial.num_tokens, trial.seconds, candidates)
        self._num_since_trial[size_of(batch)] = 0

    def _charge(self, batch: int, k: int, num_tokens: int, seconds: float, candidates: Sequence[int]) -> None:
        """What a trial took beyond what its tokens take at the best rate."""
        best_rate = self.rate(batch, self.best(batch, candidates))
        lost_s = max(0.0, seconds - num_tokens / best_rate) if best_rate > 0 else 0.0
        self._credit_s -= lost_s
        self._trial_cost[size_of(batch), k] = self._trial_cost.get((size_of(batch), k), 0.0) + lost_s

    def _count_rest(self, batch: int, k: int, num_tokens: int, elapsed_s: float, candidates: Sequence[int]) -> None:
        """Rounds of a trial that were on their way when it ended are a part of what it cost."""
        if self._last_trial is None:
            return
        if k == self._last_trial and k != self.best(batch, candidates):
            self._charge(batch, k, num_tokens, elapsed_s, candidates)
        else:
            self._last_trial = None

    def _is_lost(self, trial: Trial, batch: int, candidates: Sequence[int]) -> bool:
        """Its rounds tell that this choice is far from the best."""
        if not self._is_certain(size_of(batch), trial.k):
            return False
        return self.rate(batch, trial.k) < LOST * self.rate(batch, self.best(batch, candidates))

    def _next_trial(self, batch: int, candidates: Sequence[int]) -> Trial | None:
        """What is worth trying now: the choice that was measured longest ago among those that may win."""
        size = size_of(batch)
        num_since = self._num_since_trial[size]
        if num_since % TRIAL_CHECK or num_since < FIRST_TRIAL_AFTER or not candidates:
            return None
        best = self.best(batch, candidates)
        best_rate = self.rate(batch, best)
        if best_rate <= 0.0:
            return None
        likeliest = max(candidates, key=lambda k: self.rate(batch, k))
        if best == 0:
            rivals = [k for k in candidates if k == likeliest or not self._is_certain(size, k)]
        else:
            rivals = [0, *_neighbours(best, candidates)]
        rounds, first_rounds = (TRIAL_ROUNDS + rows // batch for rows in (TRIAL_ROWS, FIRST_TRIAL_ROWS))
        costs = {k: self._trial_cost.get((size, k)) or self._expected_cost(batch, k, rounds, best_rate) for k in rivals}
        self._credit_s = min(self._credit_s, 2 * max(costs.values()))
        for k in sorted(rivals, key=lambda k: self._tried.get((size, k), 0.0)):
            share = self.rate(batch, k) / best_rate
            if not self._is_certain(size, k) and (
                share >= (CLOSE_PLAIN if k == 0 else CLOSE)
                or (not self._is_known_elsewhere(size, k) and (k == 0 or share >= PLAUSIBLE))
            ):
                return Trial(k, first_rounds)
            is_close = num_since >= CLOSE_INTERVAL and share >= CLOSE
            is_long_ago = self._clock - self._tried.get((size, k), 0.0) > MAX_TRIAL_INTERVAL_S
            is_paid = costs[k] <= self._credit_s
            if num_since >= MIN_TRIAL_INTERVAL and (is_paid or is_close or is_long_ago):
                return Trial(k, rounds)
        return None

    def _is_certain(self, size: int, k: int) -> bool:
        known = self._times.get((size, k))
        return known is not None and known.num >= NUM_CERTAIN

    def _is_known_elsewhere(self, size: int, k: int) -> bool:
        """Whether rounds of this kind, drafted or plain, were measured at another size: that corrects the model."""
        return any(s != size and (j > 0) == (k > 0) and self._is_certain(s, j) for s, j in self._times)

    def _expected_cost(self, batch: int, k: int, rounds: int, best_rate: float) -> float:
        """Seconds that a trial will probably lose: its rounds' lesser rate, and one round for the change to it."""
        return (1 + rounds * max(0.0, 1 - self.rate(batch, k) / best_rate)) * self.round_s(batch, k)


def _neighbours(k: int, candidates: Sequence[int]) -> list[int]:
    """The next smaller and the next larger candidate."""
    ordered = sorted(candidates)
    at = ordered.index(k)
    return ordered[max(0, at - 1) : at] + ordered[at + 1 : at + 2]
