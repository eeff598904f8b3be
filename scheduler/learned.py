"""What speculation learned about a pair of models on a machine, as a record that outlives the process."""

from __future__ import annotations

import msgspec

MAX_REMEMBERED_ROWS = 32  # that an acceptance counts for when it is taken up again: other texts come


class LearnedRound(msgspec.Struct, array_like=True, frozen=True):
    """Seconds of a round of `size` rows with k drafts each, measured so often, and tried so often beside the best."""

    size: int
    k: int
    seconds: float
    num: int
    num_trials: int


class LearnedAcceptance(msgspec.Struct, array_like=True, frozen=True):
    """Chance that the draft at a place is accepted once those before it were, by so many rows."""

    rate: float
    seen: int


class Learned(msgspec.Struct, frozen=True):
    """Times hold for this machine and these models. Acceptance is of the texts of late, a beginning for others."""

    rounds: list[LearnedRound]
    plain_excess: float  # measured over modelled seconds
    drafted_excess: float
    drafted_yield: float  # committed tokens over those expected
    plain_arrival_s: float  # of a request that comes
    drafted_arrival_s: float
    neural: list[LearnedAcceptance]
    ngram: list[LearnedAcceptance]
