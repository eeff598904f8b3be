"""How many tokens to draft: the number that commits the most tokens per second, none included.

What counts is measured whole: the time from one result to the next, drafting, sending and waiting included, for each
batch size and k, and what requests that come cost beside that. Where a choice was never tried at this batch size, costs
of its parts stand in, corrected by what rounds of its kind took elsewhere. The other choices are tried again now and
then, plain decoding too, with rounds that may cost a fixed small share of the time: so a wrong estimate is found out,
and finding out never costs more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.acceptance import AcceptanceRates
from scheduler.arrivals import ArrivalCosts
from scheduler.learned import Learned, LearnedRound
from scheduler.round_time import FASTER, RoundTime

EXCESS_WEIGHT = 0.05  # of one round in the moving average of measured over modelled time
MAX_EXCESS = 4.0
YIELD_WEIGHT, MAX_YIELD_WEIGHT = 0.005, 0.05  # of one row, of one round
MIN_GAIN = 1.01  # drafting must promise this much over plain decoding
CHANGE_AFTER = 4  # results, one after the other, that speak for a change: batches come and go
TRIAL_SHARE = 0.01  # of the time may be lost by trying what is not the best choice
TRIAL_ROUNDS = 4  # of a trial, the first of which is not measured: it fills or empties the pipeline
TRIAL_ROWS, FIRST_TRIAL_ROWS = 12, 32  # where rounds have few rows there are more of them
CLOSE_PLAIN = 0.6  # as CLOSE, for the first trial of plain decoding, by which everything else is judged
CLOSE, CLOSE_INTERVAL = 0.88, 160  # a choice that is nearly as good costs little to try, so often (in results)
MIN_TRIAL_INTERVAL = 24  # results between two trials
TRIAL_CHECK = 4  # results between two looks at whether a trial is due
FIRST_TRIAL_AFTER = 12  # results at a batch size where the best other choice was never measured
MAX_TRIAL_INTERVAL_S = 60.0
LOST = 0.75  # a trial ends early where one of its rounds promises less than this share of the best
PLAUSIBLE = 0.4  # a draft length that promises less than this share of the best waits longer for its first trial
NUM_CERTAIN = 4  # rounds until a time is an average of its own
EARLY_TRIALS = 3  # of a choice at a batch size need not be paid: a server that warmed up may have misled the first
EARLY_COST_S = 0.2  # more than that is paid in any case

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def size_of(batch: int) -> int:
    """Batch sizes that are measured together."""
    return _SIZES[min(bisect_left(_SIZES, batch), len(_SIZES) - 1)]


@dataclass
class Trial:
    """Rounds with another k than the best one."""

    size: int  # batch size at its beginning
    k: int
    rounds_left: int
    seconds: float = 0.0
    num_tokens: int = 0
    fastest_s: float = 0.0  # of its whole rounds


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
        self._tried: dict[tuple[int, int], float] = {}  # -> `_clock` when it was measured or tried last
        self._last_k: dict[int, int] = {}  # batch size -> k that was measured last
        self._excess = {True: 1.0, False: 1.0}  # drafted or plain: seconds measured over those modelled
        self._num_excess = {True: 0, False: 0}
        self._yield = 1.0  # committed tokens of drafted rounds over those expected
        self._is_drafting: bool | None = None  # None: before the first result
        self._num_against = 0  # results, one after the other, that speak for a change of that
        self._trial: Trial | None = None
        self._last_trial: Trial | None = None  # the one that ended, while rounds of it still come
        self._credit_s = 0.0  # what trials may still cost
        self._trial_cost: dict[tuple[int, int], float] = {}  # (batch size, k) -> seconds that its last trial lost
        self._num_trials: Counter[tuple[int, int]] = Counter()
        self._num_since_trial: dict[int, int] = {}  # batch size -> results
        self._recalled: dict[tuple[int, int], float] = {}  # seconds of a round as known from before the start
        self._clock = 0.0  # seconds of all rounds
        self._arrivals = ArrivalCosts()

    def beliefs(self) -> tuple[dict[tuple[int, int], float], dict[bool, float]]:
        """(batch size, k) -> seconds of a round; with drafts or without -> seconds of a request that comes."""
        rounds = {key: times.value for key, times in self._times.items()}
        return rounds, {mode: self._arrivals.seconds(mode, self._clock) for mode in (False, True)}

    def learned(self, neural: AcceptanceRates, ngram: AcceptanceRates) -> Learned | None:
        """What is worth keeping; None while nothing is certain."""
        if not any(self._is_certain(size, k) for size, k in self._times):
            return None
        rounds = [
            LearnedRound(size, k, known.value, known.num, self._num_trials[size, k])
            for (size, k), known in self._times.items()
        ]
        return Learned(
            rounds=rounds,
            plain_excess=self._excess[False],
            drafted_excess=self._excess[True],
            drafted_yield=self._yield,
            plain_arrival_s=self._arrivals.seconds(False, self._clock),
            drafted_arrival_s=self._arrivals.seconds(True, self._clock),
            neural=neural.learned(),
            ngram=ngram.learned(),
        )

    def recall(self, learned: Learned) -> None:
        """Begin with what was known of the same models on this machine."""
        for known in learned.rounds:
            key = known.size, known.k
            self._times[key] = RoundTime.known(known.seconds, known.num)
            self._num_trials[key] = known.num_trials
            self._recalled[key] = known.seconds
        self._excess = {False: learned.plain_excess, True: learned.drafted_excess}
        self._num_excess = {False: NUM_CERTAIN, True: NUM_CERTAIN}
        self._yield = learned.drafted_yield
        self._arrivals.recall(learned.plain_arrival_s, learned.drafted_arrival_s, self._clock)

    # ------------------------------------------------ choosing

    def choose(self, batch: int, candidates: Sequence[int]) -> int:
        """k for the next step of `batch` rows: one of `candidates`, or 0. Changes nothing."""
        if self._trial is not None and self._trial.k in (0, *candidates):
            return self._trial.k
        return self.best(batch, candidates)

    def best(self, batch: int, candidates: Sequence[int]) -> int:
        """The k with the most expected tokens per second. Whether to draft at all changes slowly."""
        k = self._likeliest(batch, candidates)
        if k == 0 or self._is_drafting is False:
            return 0
        return k if self._is_drafting or self._gain(batch, k) > MIN_GAIN else 0

    def _likeliest(self, batch: int, candidates: Sequence[int]) -> int:
        return max(candidates, key=lambda k: self.rate(batch, k), default=0)

    def _gain(self, batch: int, k: int) -> float:
        """Of drafting over plain decoding; 1 is none."""
        plain = self.rate(batch, 0)
        return self.rate(batch, k) / plain if plain > 0.0 else 0.0

    def _vote(self, batch: int, candidates: Sequence[int]) -> None:
        """Whether a result speaks for drafting or against it."""
        if not candidates:
            return
        gain = self._gain(batch, self._likeliest(batch, candidates))
        wants_drafts = gain > MIN_GAIN
        if self._is_drafting is None:
            self._is_drafting = wants_drafts
        self._num_against = 0 if wants_drafts == self._is_drafting else self._num_against + 1
        if self._num_against >= CHANGE_AFTER:
            self._is_drafting, self._num_against = wants_drafts, 0

    def rate(self, batch: int, k: int) -> float:
        """Expected tokens per second, while requests come as they do."""
        decode_rate = self.decode_rate(batch, k)
        if decode_rate <= 0.0:
            return 0.0
        return 1 / (1 / decode_rate + self._arrival_s(k))

    def _arrival_s(self, k: int) -> float:
        """Seconds of a token that requests cost which come meanwhile."""
        return self._arrivals.per_token * self._arrivals.seconds(k > 0, self._clock)

    def decode_rate(self, batch: int, k: int) -> float:
        """Expected tokens per second of rounds without prompts."""
        seconds = self.round_s(batch, k)
        return self._tokens(batch, k) / seconds if seconds > 0.0 else 0.0

    def _tokens(self, batch: int, k: int) -> float:
        """That a round is expected to commit."""
        return batch * (max(1.0, self._expected_tokens(k) * self._yield) if k else 1.0)

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

    def prefilled(
        self, batch: int, k: int, num_started: int, num_prompt_tokens: int, num_tokens: int, elapsed_s: float
    ) -> None:
        """A step of `batch` rows that decode and of prompts gave its result.

        Args:
            k: that was chosen for these rows, even if the prompts left no place for drafts.
            num_started: requests that have their first token of it.
            num_tokens: that it committed, those not counted.
            elapsed_s: since the result before it.
        """
        self._clock += elapsed_s
        rate = self.decode_rate(batch, k)
        if rate > 0.0:
            self._arrivals.prefilled(k > 0, num_started, num_prompt_tokens, num_tokens, elapsed_s, 1 / rate)

    def finished(
        self,
        batch: int,
        k: int,
        num_tokens: int,
        elapsed_s: float,
        is_steady: bool,
        candidates: Sequence[int],
        is_drafting: bool | None = None,
    ) -> None:
        """A decode-only step gave its result.

        Args:
            elapsed_s: since the result before it.
            is_steady: that result was one of the same k and much the same batch, so that this is a whole round.
            is_drafting: drafts were wanted for these rows, even if this step has none; None: as k says.
        """
        if elapsed_s <= 0.0:
            return
        self._clock += elapsed_s
        if is_steady:
            self._measure(batch, k, num_tokens, elapsed_s)
        if (rate := self.decode_rate(batch, k)) > 0.0:
            drafts = k > 0 if is_drafting is None else is_drafting
            self._arrivals.decoded(drafts, num_tokens, elapsed_s, 1 / rate, is_steady, self._clock)
        self._vote(batch, candidates)
        if self._trial is not None:
            if is_steady and k == self._trial.k:
                self._trial.fastest_s = min(self._trial.fastest_s or elapsed_s, elapsed_s)
            self._go_on(self._trial, batch, k, num_tokens, elapsed_s, candidates)
        else:
            size = size_of(batch)
            self._count_rest(batch, k, num_tokens, elapsed_s, candidates)
            self._num_since_trial[size] = self._num_since_trial.get(size, 0) + 1
            self._credit_s += TRIAL_SHARE * elapsed_s
            self._trial = self._next_trial(batch, candidates)

    def _measure(self, batch: int, k: int, num_tokens: int, elapsed_s: float) -> None:
        size = size_of(batch)
        key = size, k
        times = self._times.setdefault(key, RoundTime())
        if self._last_k.get(size) != k:
            times.begin_stretch()
            self._last_k[size] = k
        times.add(elapsed_s)
        if key in self._recalled:
            self._check_recalled(key, times)
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

    def _check_recalled(self, key: tuple[int, int], times: RoundTime) -> None:
        """One of the times from before the start is measured again. Where it is clearly less now, the machine was busy
        with other things then, and none of the others holds."""
        if times.num_new < NUM_CERTAIN:
            return
        before = self._recalled.pop(key)
        if times.value < FASTER * before:
            for other in self._recalled:
                del self._times[other]
                self._num_trials[other] = 0
            self._recalled = {}

    def _go_on(
        self, trial: Trial, batch: int, k: int, num_tokens: int, elapsed_s: float, candidates: Sequence[int]
    ) -> None:
        trial.seconds += elapsed_s
        trial.num_tokens += num_tokens
        trial.rounds_left -= k == trial.k
        if trial.rounds_left > 0 and trial.k in (0, *candidates) and not self._is_lost(trial, batch, candidates):
            return
        self._trial, self._last_trial = None, trial
        key = trial.size, trial.k
        self._trial_cost[key] = 0.0
        self._num_trials[key] += 1
        self._tried[key] = self._clock
        self._charge(trial, batch, trial.num_tokens, trial.seconds, candidates)
        self._num_since_trial[trial.size] = self._num_since_trial[size_of(batch)] = 0

    def _charge(self, trial: Trial, batch: int, num_tokens: int, seconds: float, candidates: Sequence[int]) -> None:
        """What a trial took beyond what its tokens take at the best rate."""
        best_rate = self.rate(batch, self.best(batch, candidates))
        seconds += num_tokens * self._arrival_s(trial.k)
        lost_s = max(0.0, seconds - num_tokens / best_rate) if best_rate > 0 else 0.0
        self._credit_s -= lost_s
        key = trial.size, trial.k
        self._trial_cost[key] = self._trial_cost.get(key, 0.0) + lost_s

    def _count_rest(self, batch: int, k: int, num_tokens: int, elapsed_s: float, candidates: Sequence[int]) -> None:
        """Rounds of a trial that were on their way when it ended are a part of what it cost."""
        if self._last_trial is None:
            return
        if k == self._last_trial.k and k != self.best(batch, candidates):
            self._charge(self._last_trial, batch, num_tokens, elapsed_s, candidates)
        else:
            self._last_trial = None

    def _is_lost(self, trial: Trial, batch: int, candidates: Sequence[int]) -> bool:
        """Its own rounds tell that this choice is far from the best: what earlier ones told may hold no more."""
        if not trial.fastest_s:
            return False
        rate = self._tokens(batch, trial.k) / trial.fastest_s
        return rate < LOST * self.decode_rate(batch, self.best(batch, candidates))

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
        if best == 0:
            likeliest = self._likeliest(batch, candidates)
            rivals = [k for k in candidates if k == likeliest or self._num_trials[size, k] < EARLY_TRIALS]
        else:
            rivals = [0, *_neighbours(best, candidates)]
        rounds, first_rounds = (TRIAL_ROUNDS + rows // batch for rows in (TRIAL_ROWS, FIRST_TRIAL_ROWS))
        costs = {k: self._trial_cost.get((size, k)) or self._expected_cost(batch, k, rounds, best_rate) for k in rivals}
        self._credit_s = min(self._credit_s, 2 * max(costs.values()))
        for k in sorted(rivals, key=lambda k: self._tried.get((size, k), 0.0)):
            share = self.rate(batch, k) / best_rate
            is_new = not self._is_certain(size, k) and self._num_trials[size, k] < EARLY_TRIALS
            if is_new and (
                share >= (CLOSE_PLAIN if k == 0 else CLOSE)
                or (not self._is_known_elsewhere(size, k) and (k == 0 or share >= PLAUSIBLE))
            ):
                return Trial(size, k, first_rounds)
            is_close = num_since >= CLOSE_INTERVAL and share >= CLOSE
            is_long_ago = self._clock - self._tried.get((size, k), 0.0) > MAX_TRIAL_INTERVAL_S
            is_paid = costs[k] <= self._credit_s or (costs[k] <= EARLY_COST_S and self._is_early(size, k, num_since))
            if num_since >= MIN_TRIAL_INTERVAL and (is_paid or is_close or is_long_ago):
                return Trial(size, k, rounds)
        return None

    def _is_early(self, size: int, k: int, num_since: int) -> bool:
        """What was seldom tried is tried again soon, each time after twice as many results."""
        num = self._num_trials[size, k]
        return num < EARLY_TRIALS and num_since >= MIN_TRIAL_INTERVAL << num

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
