"""How long a step may take before the target counts as hung: a large multiple of what its steps have taken so far."""

from __future__ import annotations

FACTOR = 20.0  # a step this much slower per token than any recent one is not slow, it hangs
MIN_LIMIT_S = 10.0
NUM_LEARNING_STEPS = 32  # the first ones compile kernels and page weights in
DECAY = 0.99  # per step, of the slowest one known


class StepTimeout:
    """Args:
    max_limit_s: the limit while little is known, and at most.
    """

    def __init__(self, max_limit_s: float) -> None:
        self._max_limit_s = max_limit_s
        self.reset()

    def reset(self) -> None:
        """A new target, perhaps on another device."""
        self._num_steps = 0
        self._token_s = 0.0  # slowest recent step: seconds per token, and in all
        self._step_s = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._num_steps += 1
        self._token_s = max(self._token_s * DECAY, seconds / max(1, num_tokens))
        self._step_s = max(self._step_s * DECAY, seconds)

    def limit_s(self, num_tokens: int) -> float:
        """Seconds that a step of so many tokens may take."""
        if self._num_steps < NUM_LEARNING_STEPS:
            return self._max_limit_s
        expected = max(self._step_s, self._token_s * num_tokens)
        return min(self._max_limit_s, max(MIN_LIMIT_S, FACTOR * expected))
