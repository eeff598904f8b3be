"""Rotary position embeddings for the layouts of Hugging Face configurations.

`mx.fast.rope` is one kernel on a GPU. On the CPU it recomputes sines in scalar code for every head and layer, so there
the tables are made once per forward and shared by all layers. 12 heads of 64, 30 layers, two CPU cores, ms:

    rows                  B=1, L=1   B=8, L=1   B=1, L=256
    mx.fast.rope               3.4        3.4         30.9
    table, halves              1.2        1.5         10.3
    table, gathered halves     0.8        1.3         45.5
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from shared.errors import BadModel

MAX_GATHERED_ROWS = 8  # up to here gathering the swapped halves costs less than slicing and joining them

DEFAULT_MAX_POSITIONS = 2048  # transformers' default for Llama

Rotate = Callable[[mx.array], mx.array]
"""(batch, length, heads, dim) -> the same shape; a `Rotation` where a kernel may do it in its place."""


@dataclass(frozen=True)
class RopeParameters:
    """`inv_freq` (dim/2,) radians per position; cosines and sines are multiplied by `attention_factor`."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


def rope_parameters(config: dict[str, Any], head_dim: int, max_model_len: int) -> RopeParameters:
    """Frequencies as `config` (Hugging Face names, transformers 4 or 5) asks for.

    Two scalings depend on the length of a sequence. A cached key cannot be rotated again, so they are fixed by
    `max_model_len`, the longest sequence that is served (0: the configuration's own limit): dynamic NTK's base, and
    longrope's choice of factors.

    Raises:
        BadModel: an unknown type, or a parameter that it needs is missing.
    Source: transformers' modeling_rope_utils (definitions of the scalings).
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    base = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if share != 1.0 and kind != "proportional":
        raise BadModel("partial_rotary_factor is not supported for this architecture")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = 1.0 / base**exponents
    trained_len = config.get("max_position_embeddings") or max_model_len or DEFAULT_MAX_POSITIONS
    max_model_len = max_model_len or trained_len
    try:
        match kind:
            case "default" | "mrope":
                factor = 1.0
            case "proportional":
                # Gemma 4: the exponents of the whole head, but only its first `share` turns at all.
                num_turning = int(share * head_dim // 2)
                inv_freq, factor = np.where(np.arange(head_dim // 2) < num_turning, inv_freq, 0.0), 1.0
                inv_freq = inv_freq / (scaling.get("factor") or 1.0)
            case "linear":
                inv_freq, factor = inv_freq / scaling["factor"], 1.0
            case "dynamic":
                stretch = scaling["factor"] * max(max_model_len, trained_len) / trained_len - (scaling["factor"] - 1)
                inv_freq, factor = 1.0 / (base * stretch ** (head_dim / (head_dim - 2))) ** exponents, 1.0
            case "llama3":
                inv_freq, factor = _llama3(inv_freq, scaling), 1.0
            case "yarn":
                inv_freq, factor = _yarn(inv_freq, base, scaling, trained_len)
            case "longrope":
                inv_freq, factor = _longrope(inv_freq, scaling, config, max_model_len)
            case _:
                raise BadModel(f"unknown rope type {kind!r}")
    except KeyError as missing:
        raise BadModel(f"rope type {kind!r} needs {missing} in the model's configuration") from missing
    return RopeParameters(tuple(float(f) for f in inv_freq), factor)


def _llama3(inv_freq: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    stretched: np.ndarray = inv_freq * (smooth + (1.0 - smooth) / factor)
    return stretched


def _yarn(inv_freq: np.ndarray, base: float, scaling: dict[str, Any], trained_len: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): a ramp over dimensions between stretched and kept frequencies."""
    original = scaling.get("original_max_position_embeddings") or trained_len
    factor = scaling.get("factor") or trained_len / original
    dim = 2 * len(inv_freq)

    def correction_dim(num_rotations: float) -> float:
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction_dim(scaling.get("beta_fast") or 32), correction_dim(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    kept = 1.0 - np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return inv_freq / factor * (1.0 - kept) + inv_freq * kept, float(attention_factor)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(
    inv_freq: np.ndarray, scaling: dict[str, Any], config: dict[str, Any], max_model_len: int
) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv:2402.13753): one factor per frequency, a set for short and one for long sequences."""
    original = scaling.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    factor = scaling.get("factor") or config["max_position_embeddings"] / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    name = "long_factor" if max_model_len > original else "short_factor"
    factors = np.asarray(scaling[name], dtype=np.float64)
    if factors.shape != inv_freq.shape:
        raise BadModel(f"{name} has {factors.size} entries, the head needs {inv_freq.size}")
    return inv_freq / factors, float(attention_factor)


@dataclass(frozen=True)
class QueryScaling:
    """Later queries are longer: by 1 + beta * log(1 + floor(p / trained_len)) at position p."""

    beta: float
    trained_len: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> QueryScaling:
        """As `llama_4_scaling_beta` asks for. Raises KeyError and such where the fields are missing or malformed."""
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        made = cls(float(scaling["llama_4_scaling_beta"]), int(scaling["original_max_position_embeddings"]))
        if made.trained_len < 1:
            raise ValueError(f"original_max_position_embeddings {made.trained_len}")
        return made

    def at(self, offset: int | mx.array, length: int) -> mx.array:
        """Factors (batch or 1, length, 1, 1), float32, of `offset` as `Rope.at` has it."""
        positions = token_positions(offset, length)[..., None, None]
        return 1.0 + self.beta * mx.log(1.0 + mx.floor(positions / self.trained_len))


@dataclass(frozen=True)
class Rotation:
    """One forward's rotation of its rows, as a function and as what it is made of.

    Args:
        inv_freq: (dim/2,) float32, radians per position: dimension i rotates with i + dim/2.
        is_plain: nothing but that; a kernel may do it.
    """

    rope: Rope
    offset: int | mx.array
    inv_freq: mx.array
    dim: int
    is_plain: bool

    def __call__(self, x: mx.array) -> mx.array:
        return self.rope.rotate(x, self.offset)


class Rope:
    """Rotates queries and keys. `at` prepares one forward; what it returns is applied in every layer."""

    def __init__(self, parameters: RopeParameters) -> None:
        self.dim = 2 * len(parameters.inv_freq)
        self._factor = parameters.attention_factor
        self._inv_freq = mx.array(parameters.inv_freq, dtype=mx.float32)
        self._wavelengths = 1.0 / self._inv_freq
        self._swap = mx.concatenate([mx.arange(self.dim // 2, self.dim), mx.arange(self.dim // 2)])

    def at(self, offset: int | mx.array, length: int, batch: int, is_cpu: bool) -> Rotate:
        """The rotation for `length` tokens per row whose first is at position `offset`, a number or (batch,).

        On a CPU it may also be (batch, length), the position of every token.

        Returns:
            A function (batch, length, heads, dim) -> the same shape.
        """
        if not is_cpu:
            return Rotation(self, offset, self._inv_freq, self.dim, self._factor == 1.0)
        angles = token_positions(offset, length)[..., None, None] * self._inv_freq  # (batch or 1, length, 1, dim / 2)
        cos, sin = mx.cos(angles), mx.sin(angles)
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        if batch * length > MAX_GATHERED_ROWS:
            return lambda x: rotate_halves(x, cos, sin)
        cos, sin = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
        return lambda x: (x * cos + mx.take(x, self._swap, axis=-1) * sin).astype(x.dtype)

    def rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """x (batch, length, heads, dim), rotated in one kernel."""
        if self._factor != 1.0:
            x = x * self._factor
        x = x.swapaxes(1, 2)
        x = mx.fast.rope(x, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._wavelengths)
        return x.swapaxes(1, 2)


def plain_rope(module: Any) -> Rope | None:  # noqa: ANN401 - a rotation of mlx-lm's
    """The same as one that a kernel may do; None for a rotation with a scaling, whose own module is called."""
    if type(module) is not nn.RoPE or module.traditional or module.scale != 1.0:
        return None
    return Rope(RopeParameters(tuple(module.base ** (-i / module.dims) for i in range(0, module.dims, 2))))


def token_positions(offset: int | mx.array, length: int) -> mx.array:
    """(batch or 1, length) float32, of `offset` as `Rope.at` has it."""
    if isinstance(offset, mx.array) and offset.ndim == 2:
        return offset.astype(mx.float32)
    positions = mx.arange(length, dtype=mx.float32)
    return (positions + offset)[None] if isinstance(offset, int) else positions[None] + offset[:, None]


def rotated(x: mx.array, rotate: Rotate) -> mx.array:
    """x (B, heads, L, dim)."""
    return rotate(x.swapaxes(1, 2)).swapaxes(1, 2)


def rotated_pair(q: mx.array, k: mx.array | None, rotate: Rotate | None) -> tuple[mx.array, mx.array | None]:
    """Queries, and keys where there are any, each (B, heads, L, dim); as they are without a rotation."""
    if rotate is None:
        return q, k
    return rotated(q, rotate), None if k is None else rotated(k, rotate)


def rotate_halves(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
