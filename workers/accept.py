"""Which drafts the target accepts."""

from __future__ import annotations

from collections.abc import Sequence


def count_accepted(draft_token_ids: Sequence[int], target_token_ids: Sequence[int]) -> int:
    """How many drafts the target agrees with, from the front.

    The target draws a token at each position from its own distribution with that position's own random number (greedy:
    the argmax) and a draft is accepted while it equals the draw. So the output is what plain decoding would have given,
    whatever the drafter does. For a drafter that proposes single tokens this accepts as often as rejection sampling.

    Args:
        draft_token_ids: (k,) proposals for positions p .. p+k-1.
        target_token_ids: (k+1,) the target's draws for positions p .. p+k.
    Returns:
        n in 0..k; the step emits target_token_ids[: n + 1].
    Raises:
        ValueError: lengths do not match, so the reply belongs to another step.
    """
    if len(target_token_ids) != len(draft_token_ids) + 1:
        raise ValueError(f"{len(draft_token_ids)} drafts, {len(target_token_ids)} target tokens")
    n = 0
    while n < len(draft_token_ids) and draft_token_ids[n] == target_token_ids[n]:
        n += 1
    return n
