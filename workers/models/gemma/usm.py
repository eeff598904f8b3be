"""Gemma 3n's audio encoder, the Universal Speech Model: convolutions over log-mel frames, then conformer layers.

One clip at a time, its parts named as in the checkpoints. Local attention works as in Gemma 4's encoder (`audio.py`)
but for its window's bounds and scales.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from shared.errors import BadModel
from workers.models.gemma.audio import Blocks, clamp
from workers.models.gemma.layouts import channels_last

Pair = tuple[int, int]


@dataclass(frozen=True)
class UsmConfig:
    hidden_size: int
    num_mels: int
    num_layers: int
    num_heads: int
    channels: Pair  # of the two convolutions
    kernels: tuple[Pair, Pair]  # of each, along time and frequency
    strides: tuple[Pair, Pair]
    group_norm_eps: float
    kernel_size: int  # of the convolution along time in each layer
    residual_weight: float  # of a half feed-forward block
    reduction: int  # one row of so many is kept
    chunk_size: int
    num_past: int  # a query sees itself and so many keys behind it
    num_future: int  # and so many ahead
    logit_cap: float
    rms_norm_eps: float
    clamp: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> UsmConfig:
        """Read an `audio_config`.

        Raises:
            BadModel: a malformed field.
        """
        try:
            kernels = config.get("sscp_conv_kernel_size") or ((3, 3), (3, 3))
            strides = config.get("sscp_conv_stride_size") or ((2, 2), (2, 2))
            made = cls(
                hidden_size=int(config.get("hidden_size") or 1536),
                num_mels=int(config.get("input_feat_size") or 128),
                num_layers=int(config.get("conf_num_hidden_layers") or 12),
                num_heads=int(config.get("conf_num_attention_heads") or 8),
                channels=_pair(config.get("sscp_conv_channel_size") or (128, 32)),
                kernels=(_pair(kernels[0]), _pair(kernels[1])),
                strides=(_pair(strides[0]), _pair(strides[1])),
                group_norm_eps=float(config.get("sscp_conv_group_norm_eps") or 1e-3),
                kernel_size=int(config.get("conf_conv_kernel_size") or 5),
                residual_weight=float(config.get("conf_residual_weight", 0.5)),
                reduction=int(config.get("conf_reduction_factor") or 1),
                chunk_size=int(config.get("conf_attention_chunk_size") or 12),
                num_past=max(0, int(config.get("conf_attention_context_left", 13)) - 1),
                num_future=int(config.get("conf_attention_context_right", 0)),
                logit_cap=float(config.get("conf_attention_logit_cap") or 50.0),
                rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
                clamp=float(config.get("gradient_clipping") or 1e10),
            )
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise BadModel(f"audio: malformed configuration: {error}") from error
        if made.hidden_size % made.num_heads or made.hidden_size % 2:
            raise BadModel(f"audio: {made.num_heads} heads share a width of {made.hidden_size}")
        return made

    @property
    def context_size(self) -> int:
        """Keys that one block of queries may see."""
        return self.chunk_size + self.num_past + self.num_future

    def num_bins(self, after: int) -> int:
        """Frequencies after so many of the convolutions, each of which sees one bin of silence on both sides."""
        bins = self.num_mels
        for (_, kernel), (_, stride) in zip(self.kernels[:after], self.strides[:after], strict=True):
            bins = (bins + 2 - kernel) // stride + 1
        return bins

    def num_rows(self, num_frames: int) -> int:
        """What the encoder makes of so many frames."""
        for stride, _ in self.strides:
            num_frames = -(-num_frames // stride)
        return -(-num_frames // self.reduction)


def _pair(given: Any) -> Pair:  # noqa: ANN401 - a field of a JSON file
    first, second = given
    return int(first), int(second)


class CumulativeGroupNorm(nn.Module):
    """Each frame by mean and variance of all values up to it."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((channels,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Of x (T, bins, channels)."""
        values = x.astype(mx.float32)
        count = mx.arange(1, x.shape[0] + 1)[:, None, None] * (x.shape[1] * x.shape[2])
        mean = mx.cumsum(values.sum(axis=(1, 2), keepdims=True), axis=0) / count
        # Differences from the mean at their own time, as the reference adds them up.
        variance = mx.cumsum(mx.square(values - mean).sum(axis=(1, 2), keepdims=True), axis=0) / count
        return ((values - mean) * mx.rsqrt(variance + self.eps) * self.weight.astype(mx.float32)).astype(x.dtype)


class Subsampling(nn.Module):
    """A convolution that looks ahead in time, never back."""

    def __init__(self, config: UsmConfig, index: int) -> None:
        super().__init__()
        inputs = 1 if index == 0 else config.channels[0]
        self.num_ahead = config.kernels[index][0] - 1
        self.conv = nn.Conv2d(
            inputs, config.channels[index], config.kernels[index], stride=config.strides[index], bias=False
        )
        self.norm = CumulativeGroupNorm(config.channels[index], config.group_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        padded = mx.pad(x, [(0, self.num_ahead), (1, 1), (0, 0)])
        return nn.relu(self.norm(self.conv(padded[None])[0]))


class SubsampleProjection(nn.Module):
    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        self.conv_0, self.conv_1 = Subsampling(config, 0), Subsampling(config, 1)
        self.input_proj_linear = nn.Linear(config.num_bins(2) * config.channels[1], config.hidden_size, bias=False)

    def __call__(self, frames: mx.array) -> mx.array:
        return self.input_proj_linear(self.conv_1(self.conv_0(frames[:, :, None])).flatten(1))


class RelativePositions(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(hidden, hidden, bias=False)


class LocalAttention(nn.Module):
    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.per_dim_scale = mx.zeros((hidden // config.num_heads,))
        self.relative_position_embedding = RelativePositions(hidden)

    def __call__(self, x: mx.array, blocks: Blocks) -> mx.array:
        """Of x (T, H)."""
        c, length = self.config, x.shape[0]
        dim = c.hidden_size // c.num_heads
        q, k, v = (
            projection(x).astype(mx.float32).reshape(length, c.num_heads, dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * (dim**-0.5 / math.log(2)) * nn.softplus(self.per_dim_scale.astype(mx.float32))
        num_blocks = blocks.keys.shape[0]
        q = mx.pad(q, [(0, num_blocks * c.chunk_size - length), (0, 0), (0, 0)])
        q = q.reshape(num_blocks, c.chunk_size, c.num_heads, dim).swapaxes(1, 2)  # (blocks, heads, chunk, dim)
        k, v = (rows[blocks.keys].swapaxes(1, 2) for rows in (k, v))  # (blocks, heads, context, dim)
        by_distance = self.relative_position_embedding.pos_proj(blocks.positions.astype(x.dtype)).astype(mx.float32)
        by_distance = by_distance.reshape(-1, c.num_heads, dim).transpose(1, 2, 0)  # (heads, dim, distances)
        biases = mx.pad(q @ by_distance, [(0, 0), (0, 0), (0, 0), (0, 1)])
        biases = mx.take_along_axis(biases, mx.broadcast_to(blocks.distances, (*q.shape[:3], c.context_size)), axis=-1)
        scores = mx.tanh((q @ k.swapaxes(2, 3) + biases) / c.logit_cap) * c.logit_cap
        weights = mx.softmax(mx.where(blocks.is_seen[:, None], scores, -1e9), axis=-1)
        out = (weights @ v).swapaxes(1, 2).reshape(num_blocks * c.chunk_size, c.hidden_size)[:length]
        return out.astype(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.clamp = config.clamp
        self.pre_attn_norm = nn.RMSNorm(hidden, 1e-6)
        self.attn = LocalAttention(config)
        self.post = nn.Linear(hidden, hidden, bias=False)
        self.post_norm = nn.RMSNorm(hidden, 1e-6)

    def __call__(self, x: mx.array, blocks: Blocks) -> mx.array:
        attended = self.post(self.attn(self.pre_attn_norm(clamp(x, self.clamp)), blocks))
        return x + self.post_norm(clamp(attended, self.clamp))


class FeedForward(nn.Module):
    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.pre_layer_norm = nn.RMSNorm(hidden, 1e-6)
        self.ffw_layer_1 = nn.Linear(hidden, 4 * hidden, bias=False)
        self.ffw_layer_2 = nn.Linear(4 * hidden, hidden, bias=False)
        self.post_layer_norm = nn.RMSNorm(hidden, 1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        inner = nn.silu(self.ffw_layer_1(self.pre_layer_norm(clamp(x, self.config.clamp))))
        out = self.post_layer_norm(clamp(self.ffw_layer_2(inner), self.config.clamp))
        return x + out * self.config.residual_weight


class LightConvolution(nn.Module):
    """A gated convolution along time, causal, each channel by itself."""

    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.pre_layer_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.linear_start = nn.Linear(hidden, 2 * hidden, bias=False)
        self.depthwise_conv1d = nn.Conv1d(hidden, hidden, config.kernel_size, groups=hidden, bias=False)
        self.conv_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.linear_end = nn.Linear(hidden, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.linear_start(self.pre_layer_norm(x)), 2, axis=-1)
        inner = mx.pad(value * mx.sigmoid(gate), [(self.config.kernel_size - 1, 0), (0, 0)])
        inner = clamp(self.depthwise_conv1d(inner[None])[0], self.config.clamp)
        return x + self.linear_end(nn.silu(self.conv_norm(inner)))


class Layer(nn.Module):
    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        self.clamp = config.clamp
        self.ffw_layer_start, self.ffw_layer_end = FeedForward(config), FeedForward(config)
        self.attention = Attention(config)
        self.lconv1d = LightConvolution(config)
        self.norm = nn.RMSNorm(config.hidden_size, 1e-6)

    def __call__(self, x: mx.array, blocks: Blocks) -> mx.array:
        x = self.lconv1d(self.attention(self.ffw_layer_start(x), blocks))
        return self.norm(clamp(self.ffw_layer_end(x), self.clamp))


class UsmTower(nn.Module):
    def __init__(self, config: UsmConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample_conv_projection = SubsampleProjection(config)
        self.conformer = [Layer(config) for _ in range(config.num_layers)]

    def __call__(self, frames: mx.array) -> mx.array:
        """Log-mel frames (T, mels), T at least 1 -> (num_rows(T), H)."""
        x = self.subsample_conv_projection(frames.astype(self.subsample_conv_projection.conv_0.conv.weight.dtype))
        blocks = Blocks(self.config, x.shape[0], is_inclusive=True)
        for layer in self.conformer:
            x = layer(x, blocks)
        return x[:: self.config.reduction]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights by the names that they have in this module."""
        return channels_last(weights, dict(tree_flatten(self.parameters())))
