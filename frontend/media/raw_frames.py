"""Samples as they are, in frames: what `gemma4_unified` takes in place of log-mel frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RawFrames:
    """Each frame of `frame_size` samples becomes one token."""

    frame_size: int = 640
    rate: int = 16_000

    def num_tokens(self, num_samples: int) -> int:
        return -(-num_samples // self.frame_size)

    def __call__(self, samples: NDArray[np.float32], param: str) -> NDArray[np.float32]:
        """Samples (n,) at `rate` -> (num_tokens(n), frame_size), silence behind the last one."""
        padded = np.pad(samples, (0, -len(samples) % self.frame_size))
        return padded.reshape(-1, self.frame_size).astype(np.float32)
