"""Whether archived blocks come sooner than the model computes them again: a GPU can be faster than a disk."""

from __future__ import annotations

from scheduler.costs import follow

MIN_TOKENS = 128  # of a step that tells how long a prompt's token takes
SLOWER = 2.0  # loading leaves the device to others, so it may take this much longer than computing
TRY_EVERY = 16  # what was slow may lie in host memory now: one of so many loads that do not pay is made all the same


class ArchivePace:
    """Moving averages, 0 while nothing was measured: then blocks are loaded, which measures it.

    Args:
        token_s: what a prompt's token takes at most, where the target has measured wide steps.
    """

    def __init__(self, token_s: float = 0.0) -> None:
        self.token_s = token_s  # of a prompt, computed
        self.block_s = 0.0  # loaded, from the request to its being in place
        self._num_left_out = 0

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step with a prompt's rows took `seconds`."""
        if num_tokens >= MIN_TOKENS:
            measured = seconds / num_tokens
            self.token_s = follow(self.token_s, measured) if self.token_s else measured

    def loaded(self, num_blocks: int, seconds: float) -> None:
        if num_blocks:
            measured = seconds / num_blocks
            self.block_s = follow(self.block_s, measured) if self.block_s else measured

    def is_worth(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether to load `num_blocks` in place of computing `num_tokens`."""
        if num_blocks * self.block_s <= SLOWER * num_tokens * self.token_s or not self.token_s:
            return True
        self._num_left_out += 1
        return self._num_left_out % TRY_EVERY == 0
