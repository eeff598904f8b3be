"""Gemma 4's audio encoder: two strided convolutions over log-mel frames, then conformer layers with local attention.

One clip at a time and its real frames only, so no mask for padding is needed. Attention runs in blocks of
`chunk_size` queries, each with the keys of its block and those before it that its window reaches: time grows with the
length of a clip, not with its square.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel
from workers.models.gemma.clipped import ClippedLinear

MAX_TIMESCALE = 10_000.0


class LocalAttention(Protocol):
    """What `Blocks` need to know of an encoder, as `AudioConfig` has it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def num_past(self) -> int: ...
    @property
    def num_future(self) -> int: ...
    @property
    def context_size(self) -> int: ...


@dataclass(frozen=True)
class AudioConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    channels: tuple[int, int]  # of the two convolutions
    kernel_size: int  # of the convolution along time in each layer
    residual_weight: float  # of a half feed-forward block
    chunk_size: int
    num_past: int  # a query sees itself and what is less than this far behind it
    num_future: int  # and what is less than this far ahead
    logit_cap: float
    is_clipped: bool
    rms_norm_eps: float
    clamp: float
    output_size: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> AudioConfig:
        """Read an `audio_config`.

        Raises:
            BadModel: a malformed field, or an activation that the encoder does not compute.
        """
        if (activation := config.get("hidden_act") or "silu") not in ("silu", "swish"):
            raise BadModel(f"audio: hidden_act {activation!r} is not supported")
        try:
            first, second = config.get("subsampling_conv_channels") or (128, 32)
            made = cls(
                hidden_size=int(config.get("hidden_size") or 1024),
                num_layers=int(config.get("num_hidden_layers") or 12),
                num_heads=int(config.get("num_attention_heads") or 8),
                channels=(int(first), int(second)),
                kernel_size=int(config.get("conv_kernel_size") or 5),
                residual_weight=float(config.get("residual_weight", 0.5)),
                chunk_size=int(config.get("attention_chunk_size") or 12),
                num_past=int(config.get("attention_context_left", 13)) - 1,
                num_future=int(config.get("attention_context_right", 0)),
                logit_cap=float(config.get("attention_logit_cap") or 50.0),
                is_clipped=bool(config.get("use_clipped_linears", True)),
                rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
                clamp=float(config.get("gradient_clipping") or 1e10),
                output_size=int(config.get("output_proj_dims") or 1536),
            )
        except (TypeError, ValueError) as error:
            raise BadModel(f"audio: malformed configuration: {error}") from error
        if made.hidden_size % made.num_heads or made.hidden_size % 2:
            raise BadModel(f"audio: {made.num_heads} heads share a width of {made.hidden_size}")
        return made

    @property
    def context_size(self) -> int:
        """Keys that one block of queries may see."""
        return self.chunk_size + self.num_past + self.num_future


class Attention(nn.Module):
    """Local attention whose scores depend on the distance too, capped by a tanh."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.post = (
            ClippedLinear(hidden, hidden, config.is_clipped) for _ in range(4)
        )
        self.relative_k_proj = nn.Linear(hidden, hidden, bias=False)
        self.per_dim_scale = mx.zeros((hidden // config.num_heads,))

    def __call__(self, x: mx.array, blocks: Blocks) -> mx.array:
        """Of x (T, H)."""
        c, length = self.config, x.shape[0]
        dim = c.hidden_size // c.num_heads
        q, k, v = (
            projection(x).astype(mx.float32).reshape(length, c.num_heads, dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * (dim**-0.5 / math.log(2)) * nn.softplus(self.per_dim_scale.astype(mx.float32))
        k = k * (math.log(1 + math.e) / math.log(2))
        num_blocks = blocks.keys.shape[0]
        q = mx.pad(q, [(0, num_blocks * c.chunk_size - length), (0, 0), (0, 0)])
        q = q.reshape(num_blocks, c.chunk_size, c.num_heads, dim).swapaxes(1, 2)  # (blocks, heads, chunk, dim)
        k, v = (rows[blocks.keys].swapaxes(1, 2) for rows in (k, v))  # (blocks, heads, context, dim)
        by_distance = self.relative_k_proj(blocks.positions.astype(x.dtype)).astype(mx.float32)
        by_distance = by_distance.reshape(-1, c.num_heads, dim).transpose(1, 2, 0)  # (heads, dim, distances)
        biases = mx.pad(q @ by_distance, [(0, 0), (0, 0), (0, 0), (0, 1)])
        biases = mx.take_along_axis(biases, mx.broadcast_to(blocks.distances, (*q.shape[:3], c.context_size)), axis=-1)
        scores = mx.tanh((q @ k.swapaxes(2, 3) + biases) / c.logit_cap) * c.logit_cap
        weights = mx.softmax(mx.where(blocks.is_seen[:, None], scores, -1e9), axis=-1)
        out = (weights @ v).swapaxes(1, 2).reshape(num_blocks * c.chunk_size, c.hidden_size)[:length]
        return self.post(out.astype(x.dtype))


class Blocks:
    """What all layers' attention shares for a clip of `length` positions.

    Attributes:
        keys: (blocks, context) position of each key, held within the clip.
        is_seen: (blocks, chunk, context) is the key in the clip and in the query's window?
        positions: (distances, H) sines and cosines of the distances context // 2 .. 0, or of num_past .. -num_future.
        distances: (chunk, context) which of `positions` applies; one past the last: none does.
    """

    def __init__(self, config: LocalAttention, length: int, is_inclusive: bool = False) -> None:
        """Args:
        is_inclusive: keys at the bounds of the window are seen (Gemma 3n); Gemma 4 does not see them.
        """
        chunk, context = config.chunk_size, config.context_size
        first = mx.arange(-(-length // chunk))[:, None] * chunk
        keys = first - config.num_past + mx.arange(context)
        queries = first + mx.arange(chunk)
        distance = queries[:, :, None] - keys[:, None, :]
        if is_inclusive:
            in_window = (distance <= config.num_past) & (-distance <= config.num_future)
            farthest, nearest = config.num_past, -config.num_future
        else:
            in_window = (distance >= 0) & (distance < config.num_past) | (distance < 0) & (
                -distance < config.num_future
            )
            farthest, nearest = context // 2, 0
        self.is_seen = in_window & (keys >= 0)[:, None] & (keys < length)[:, None]
        self.keys = mx.clip(keys, 0, length - 1)
        num_distances = farthest - nearest + 1
        timescales = config.hidden_size // 2
        increment = math.log(MAX_TIMESCALE) / max(timescales - 1, 1)
        frequencies = mx.exp(mx.arange(timescales, dtype=mx.float32) * -increment)
        angles = mx.arange(farthest, nearest - 1, -1, dtype=mx.float32)[:, None] * frequencies
        self.positions = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
        index = mx.arange(context)[None] - mx.arange(chunk)[:, None]
        self.distances = mx.where((index >= 0) & (index < num_distances), index, num_distances)


class FeedForward(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.ffw_layer_1 = ClippedLinear(hidden, 4 * hidden, config.is_clipped)
        self.ffw_layer_2 = ClippedLinear(4 * hidden, hidden, config.is_clipped)
        self.pre_layer_norm = nn.RMSNorm(hidden, 1e-6)
        self.post_layer_norm = nn.RMSNorm(hidden, 1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        inner = nn.silu(self.ffw_layer_1(self.pre_layer_norm(clamp(x, self.config.clamp))))
        out = self.post_layer_norm(clamp(self.ffw_layer_2(inner), self.config.clamp))
        return x + out * self.config.residual_weight


class LightConvolution(nn.Module):
    """A gated convolution along time, causal, each channel by itself."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.linear_start = ClippedLinear(hidden, 2 * hidden, config.is_clipped)
        self.linear_end = ClippedLinear(hidden, hidden, config.is_clipped)
        self.depthwise_conv1d = nn.Conv1d(hidden, hidden, config.kernel_size, groups=hidden, bias=False)
        self.pre_layer_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.conv_norm = nn.RMSNorm(hidden, config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.linear_start(self.pre_layer_norm(x)), 2, axis=-1)
        inner = mx.pad(value * mx.sigmoid(gate), [(self.config.kernel_size - 1, 0), (0, 0)])
        inner = clamp(self.depthwise_conv1d(inner[None])[0], self.config.clamp)
        return x + self.linear_end(nn.silu(self.conv_norm(inner)))


class Layer(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.clamp = config.clamp
        self.feed_forward1, self.feed_forward2 = FeedForward(config), FeedForward(config)
        self.self_attn = Attention(config)
        self.lconv1d = LightConvolution(config)
        self.norm_pre_attn = nn.RMSNorm(config.hidden_size, 1e-6)
        self.norm_post_attn = nn.RMSNorm(config.hidden_size, 1e-6)
        self.norm_out = nn.RMSNorm(config.hidden_size, 1e-6)

    def __call__(self, x: mx.array, blocks: Blocks) -> mx.array:
        x = self.feed_forward1(x)
        attended = self.self_attn(self.norm_pre_attn(clamp(x, self.clamp)), blocks)
        x = x + self.norm_post_attn(clamp(attended, self.clamp))
        x = self.feed_forward2(self.lconv1d(x))
        return self.norm_out(clamp(x, self.clamp))


class Subsampling(nn.Module):
    """One convolution that halves time and frequency."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(outputs, eps, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.relu(self.norm(self.conv(x)))


class SubsampleProjection(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.channels
        self.layer0 = Subsampling(1, first, config.rms_norm_eps)
        self.layer1 = Subsampling(first, second, config.rms_norm_eps)
        self.input_proj_linear = nn.Linear(first // 4 * second, config.hidden_size, bias=False)

    def __call__(self, frames: mx.array) -> mx.array:
        """(T, mels) -> (ceil(T / 4), H)."""
        x = self.layer1(self.layer0(frames[None, :, :, None]))[0]
        return self.input_proj_linear(x.flatten(1))


class AudioTower(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample_conv_projection = SubsampleProjection(config)
        self.layers = [Layer(config) for _ in range(config.num_layers)]
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)

    def __call__(self, frames: mx.array) -> mx.array:
        """Soft tokens of one clip, before the projection to the text decoder's width.

        Args:
            frames: (T, mels) log-mel frames, T at least 1.
        Returns:
            (ceil(T / 4), output_size)
        """
        x = self.subsample_conv_projection(frames.astype(self.output_proj.weight.dtype))
        blocks = Blocks(self.config, x.shape[0])
        for layer in self.layers:
            x = layer(x, blocks)
        return self.output_proj(x)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Convolutions as MLX has them, channels last; MLX's own checkpoints hold them so."""
        made = {}
        for name, weight in weights.items():
            if name.endswith("depthwise_conv1d.weight") and weight.shape[-1] != 1:
                weight = weight.swapaxes(1, 2)
            elif name.endswith(".conv.weight") and weight.shape[1:3] != (3, 3):
                weight = weight.transpose(0, 2, 3, 1)
            made[name] = weight
        return made


def clamp(x: mx.array, bound: float) -> mx.array:
    """A bound beyond the type's range clamps nothing."""
    bound = min(bound, float(mx.finfo(x.dtype).max))
    return mx.clip(x, -bound, bound)
