"""Whether archived blocks come sooner than the model computes them again: a GPU can be faster than a disk."""

from __future__ import annotations

from scheduler.costs import follow

MIN_TOKENS = 128  # of a step that tells how long a prompt's token takes
SLOWER = 2.0  # loading leaves the device to others, so it may take this much longer than computing
TRY_EVERY = 16  # what was slow may lie in host memory now: one of so many loads that do not pay is tried again
ASSUMED_BYTES_PER_S = 200e6  # until the first load tells: of a slow disk, so that a fast GPU does not wait for all


class ArchivePace:
    """Moving averages, 0 while nothing was measured.

    Args:
        token_s: what a prompt's token takes at most, where the target has measured wide steps.
        block_bytes: of an archived block.
    """

    def __init__(self, token_s: float = 0.0, block_bytes: int = 0) -> None:
        self.token_s = token_s  # of a prompt, computed
        self.block_s = 0.0  # loaded, from the request to its being in place
        self._assumed_s = block_bytes / ASSUMED_BYTES_PER_S
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

    def num_worth(self, num_blocks: int, num_tokens: int) -> int:
        """How many of `num_blocks` to load in place of computing `num_tokens`: all, none, or, to learn what loading
        takes, so few that it takes no longer than computing all."""
        compute_s, block_s = num_tokens * self.token_s, self.block_s or self._assumed_s
        if num_blocks * block_s <= SLOWER * compute_s or not self.token_s:
            return num_blocks
        if self.block_s:
            self._num_left_out += 1
            if self._num_left_out % TRY_EVERY:
                return 0
        return max(1, min(num_blocks, int(compute_s / block_s)))
