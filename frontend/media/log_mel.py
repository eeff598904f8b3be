"""Log-mel frames as the audio encoders of Gemma 4 and Gemma 3n were trained on them.

Source: the feature extractor's parameters in the model's processor_config.json (transformers' names).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import BadModel, InvalidRequest

Frames = NDArray[np.float32]
GEMMA3N_DEFAULTS = {
    "frame_length_ms": 32.0, "min_frequency": 125.0, "max_frequency": 7600.0, "preemphasis": 0.97,
    "fft_overdrive": True, "mel_floor": 1e-5,
}  # fmt: skip
GEMMA3N_MULTIPLE = 128  # samples


@dataclass(frozen=True)
class LogMel:
    """A frame each `hop_ms`, of a Hann window of `frame_ms`; magnitudes, HTK mel scale, natural logarithm.

    Args:
        multiple: 0: half a frame of silence stands before the first sample, only frames of real samples are made, and
            the floor is added (Gemma 4). Otherwise silence fills the samples up to a multiple of it, and the floor is
            what is no smaller (Gemma 3n).
    """

    num_mels: int = 128
    rate: int = 16_000
    frame_ms: float = 20.0
    hop_ms: float = 10.0
    min_hz: float = 0.0
    max_hz: float = 8000.0
    preemphasis: float = 0.0
    is_htk_preemphasis: bool = True
    is_fft_doubled: bool = False
    scale: float = 1.0
    floor: float = 1e-3
    mean: tuple[float, ...] = field(default=())
    deviation: tuple[float, ...] = field(default=())
    multiple: int = 0

    @classmethod
    def from_hf(cls, config: dict[str, Any], is_gemma3n: bool = False) -> LogMel:
        """Read a feature extractor's configuration; what is absent has transformers' default.

        Raises:
            BadModel: a malformed field, or dithering, which would make an answer depend on chance.
        """
        if config.get("dither"):
            raise BadModel("audio: dither is not supported")
        if is_gemma3n:
            config = GEMMA3N_DEFAULTS | config
        try:
            return cls(
                num_mels=int(config.get("feature_size", 128)),
                rate=int(config.get("sampling_rate", 16_000)),
                frame_ms=float(config.get("frame_length_ms", 20.0)),
                hop_ms=float(config.get("hop_length_ms", 10.0)),
                min_hz=float(config.get("min_frequency", 0.0)),
                max_hz=float(config.get("max_frequency", 8000.0)),
                preemphasis=float(config.get("preemphasis", 0.0)),
                is_htk_preemphasis=bool(config.get("preemphasis_htk_flavor", True)),
                is_fft_doubled=bool(config.get("fft_overdrive", False)),
                scale=float(config.get("input_scale_factor", 1.0)),
                floor=float(config.get("mel_floor", 1e-3)),
                mean=tuple(float(m) for m in config.get("per_bin_mean") or ()),
                deviation=tuple(float(d) for d in config.get("per_bin_stddev") or ()),
                multiple=GEMMA3N_MULTIPLE if is_gemma3n else 0,
            )
        except (TypeError, ValueError) as error:
            raise BadModel(f"audio: malformed feature extractor: {error}") from error

    @property
    def frame_length(self) -> int:
        return round(self.rate * self.frame_ms / 1000)

    @property
    def hop_length(self) -> int:
        return round(self.rate * self.hop_ms / 1000)

    @property
    def fft_length(self) -> int:
        length: int = 2 ** math.ceil(math.log2(self.frame_length))
        return 2 * length if self.is_fft_doubled else length

    def num_frames(self, num_samples: int) -> int:
        before, after = self._silence(num_samples)
        return max(0, (before + num_samples + after - self.frame_length - 1) // self.hop_length + 1)

    def _silence(self, num_samples: int) -> tuple[int, int]:
        """Samples before and after the real ones."""
        return (0, -num_samples % self.multiple) if self.multiple else (self.frame_length // 2, 0)

    def num_tokens(self, num_samples: int) -> int:
        """Soft tokens after the encoder's two strided convolutions."""
        return -(-self.num_frames(num_samples) // 4)

    def __call__(self, samples: NDArray[np.float32], param: str) -> Frames:
        """Samples (n,) at `rate` -> (num_frames(n), num_mels).

        Raises:
            InvalidRequest: not even one frame.
        """
        count = self.num_frames(len(samples))
        if count == 0:
            raise InvalidRequest(f"the audio is shorter than one frame of {self.frame_ms:g} ms", param=param)
        padded = np.pad(samples * self.scale, self._silence(len(samples)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.frame_length + 1)[:: self.hop_length][:count]
        spectrum = np.abs(np.fft.rfft(self._emphasised(windows) * self._window, n=self.fft_length, axis=-1))
        energies = spectrum @ self._filters
        mels = np.log(np.maximum(energies, self.floor) if self.multiple else energies + self.floor)
        if self.mean:
            mels = mels - np.array(self.mean)
        if self.deviation:
            mels = mels / np.array(self.deviation)
        return mels.astype(np.float32)

    def _emphasised(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(frames, frame_length + 1) -> (frames, frame_length); the window has a sample more for this step."""
        if not self.preemphasis:
            return windows[:, :-1]
        if not self.is_htk_preemphasis:
            return windows[:, 1:] - self.preemphasis * windows[:, :-1]
        first = windows[:, :1] * (1.0 - self.preemphasis)
        return np.concatenate([first, windows[:, 1:-1] - self.preemphasis * windows[:, :-2]], axis=1)

    @cached_property
    def _window(self) -> NDArray[np.float32]:
        """A periodic Hann window, in the precision in which the references compute theirs."""
        samples: NDArray[Any] = np.arange(self.frame_length, dtype=np.float32 if self.multiple else np.float64)
        window: NDArray[np.float32] = (0.5 * (1 - np.cos(2 * np.pi * samples / self.frame_length))).astype(np.float32)
        return window

    @cached_property
    def _filters(self) -> NDArray[np.float64]:
        """(frequencies, mels) triangles of height one, equally spaced on the HTK mel scale."""
        low, high = (2595.0 * math.log10(1.0 + hz / 700.0) for hz in (self.min_hz, self.max_hz))
        edges = 700.0 * (10.0 ** (np.linspace(low, high, self.num_mels + 2) / 2595.0) - 1.0)
        bins = np.linspace(0, self.rate // 2, self.fft_length // 2 + 1)
        slopes = edges[None, :] - bins[:, None]
        widths = np.diff(edges)
        rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
        triangles: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
        return triangles
