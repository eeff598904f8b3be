"""Gemma 3n's image encoder, MobileNet-V5: convolutions and attention in four stages, the last two of them fused.

Parts are named as timm names them, whose `mobilenetv5_300m_enc` the checkpoints hold; channels come last, as in MLX.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from shared.errors import BadModel
from workers.models.gemma.layouts import channels_last

ARCHITECTURE = "mobilenetv5_300m_enc"
STEM_CHANNELS = 64
OUTPUT_CHANNELS = 2048
EPS = 1e-6


@dataclass(frozen=True)
class MobileNetConfig:
    multiplier: float  # of the channels of all stages
    side: int  # of the square of tokens that comes out

    @classmethod
    def from_hf(cls, config: dict[str, Any], num_tokens: int) -> MobileNetConfig:
        """Read a `vision_config` of timm's wrapper.

        Raises:
            BadModel: another architecture, an option of timm's that is not computed, or a number of tokens that is not
                the encoder's.
        """
        if (architecture := config.get("architecture") or ARCHITECTURE) != ARCHITECTURE:
            raise BadModel(f"vision: architecture {architecture!r} is not {ARCHITECTURE}")
        options = {**(config.get("model_args") or {})}
        try:
            made = cls(float(options.pop("channel_multiplier", 1.0)), int(options.pop("msfa_output_resolution", 16)))
            width = int(config.get("hidden_size") or OUTPUT_CHANNELS)
        except (TypeError, ValueError) as error:
            raise BadModel(f"vision: malformed configuration: {error}") from error
        if options:
            raise BadModel(f"vision: model_args {sorted(options)[0]!r} is not supported")
        if made.side**2 != num_tokens or width != OUTPUT_CHANNELS:
            raise BadModel(
                f"vision: {num_tokens} tokens of {width}, the encoder gives {made.side**2} of {OUTPUT_CHANNELS}"
            )
        return made

    @property
    def stem_channels(self) -> int:
        return STEM_CHANNELS if self.multiplier < 1 else self.channels(STEM_CHANNELS)

    def channels(self, count: int) -> int:
        return multiple_of_8(count * self.multiplier)


def multiple_of_8(count: float) -> int:
    """The nearest one, at least 8 and not less than nine tenths of it."""
    rounded = max(8, int(count + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * count else rounded


def padded(x: mx.array, kernel: int, stride: int) -> mx.array:
    """x (B, height, width, C) for an output of 1 / stride of its size, rounded up; an odd zero goes to the end."""
    pads = []
    for size in x.shape[1:3]:
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    return mx.pad(x, [(0, 0), *pads, (0, 0)])


class Convolution(nn.Module):
    """Each channel by itself with `is_depthwise`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, is_depthwise: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, inputs if is_depthwise else 1
        self.weight = mx.zeros((outputs, kernel, kernel, inputs // self.groups))
        if bias:
            self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array) -> mx.array:
        if self.kernel == 1:
            out = x @ self.weight[:, 0, 0].T
        else:
            x = padded(x, self.kernel, self.stride)
            out = mx.conv2d(x, self.weight, stride=self.stride, groups=self.groups)
        return out + self.bias if "bias" in self else out


class Normed(nn.Module):
    """A convolution, a norm over channels and, where asked for, GELU."""

    def __init__(self, convolution: Convolution, is_active: bool) -> None:
        super().__init__()
        self.conv = convolution
        self.bn = nn.RMSNorm(convolution.weight.shape[0], EPS)
        self.is_active = is_active

    def __call__(self, x: mx.array) -> mx.array:
        x = self.bn(self.conv(x))
        return nn.gelu_approx(x) if self.is_active else x


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return x * self.gamma


class Edge(nn.Module):
    """A plain convolution that expands, and a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = multiple_of_8(4 * inputs)
        self.conv_exp = Convolution(inputs, inner, 3, stride)
        self.bn1 = nn.RMSNorm(inner, EPS)
        self.conv_pwl = Convolution(inner, outputs, 1)
        self.bn2 = nn.RMSNorm(outputs, EPS)
        self.has_skip = inputs == outputs and stride == 1

    def __call__(self, x: mx.array) -> mx.array:
        out = self.bn2(self.conv_pwl(nn.gelu_approx(self.bn1(self.conv_exp(x)))))
        return x + out if self.has_skip else out


class Inverted(nn.Module):
    """An expansion and a projection, with depthwise convolutions before and between them where their size is not 0."""

    def __init__(
        self, inputs: int, outputs: int, start: int = 0, middle: int = 0, stride: int = 1, expansion: int = 2,
        is_block: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = multiple_of_8(expansion * inputs)
        if start:
            own_stride = 1 if middle else stride
            self.dw_start = Normed(Convolution(inputs, inputs, start, own_stride, is_depthwise=True), False)
        self.pw_exp = Normed(Convolution(inputs, inner, 1), True)
        if middle:
            self.dw_mid = Normed(Convolution(inner, inner, middle, stride, is_depthwise=True), True)
        self.pw_proj = Normed(Convolution(inner, outputs, 1), False)
        if is_block:
            self.layer_scale = LayerScale(outputs)
        self.has_skip = is_block and inputs == outputs and stride == 1

    def __call__(self, x: mx.array) -> mx.array:
        out = self.dw_start(x) if "dw_start" in self else x
        out = self.pw_exp(out)
        out = self.pw_proj(self.dw_mid(out) if "dw_mid" in self else out)
        out = self.layer_scale(out) if "layer_scale" in self else out
        return x + out if self.has_skip else out


class Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        if stride > 1:
            self.down_conv = Convolution(inputs, inputs, 3, stride, is_depthwise=True)
            self.norm = nn.RMSNorm(inputs, EPS)
        self.proj = Convolution(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(self.norm(self.down_conv(x)) if "down_conv" in self else x)


class MultiQuery(nn.Module):
    """All heads share keys and values, of fewer places where `stride` is more than 1."""

    def __init__(self, channels: int, num_heads: int, head_dim: int, stride: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.query = Projection(channels, num_heads * head_dim)
        self.key, self.value = (Projection(channels, head_dim, stride) for _ in range(2))
        self.output = Projection(num_heads * head_dim, channels)

    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, _ = x.shape
        q = self.query(x).reshape(batch, height * width, self.num_heads, self.head_dim).swapaxes(1, 2)
        k, v = (rows(x).reshape(batch, 1, -1, self.head_dim) for rows in (self.key, self.value))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.output(out.swapaxes(1, 2).reshape(batch, height, width, self.num_heads * self.head_dim))


class Attention(nn.Module):
    def __init__(self, channels: int, num_heads: int, head_dim: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels, EPS)
        self.attn = MultiQuery(channels, num_heads, head_dim, stride)
        self.layer_scale = LayerScale(channels)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.layer_scale(self.attn(self.norm(x)))


def make_stages(config: MobileNetConfig) -> list[list[nn.Module]]:
    """Each halves the image."""
    stem, first, second, third, fourth = config.stem_channels, *(config.channels(c) for c in (128, 256, 640, 1280))
    stages: list[list[nn.Module]] = [
        [Edge(stem, first, 2), Edge(first, first, 1), Edge(first, first, 1)],
        [
            Inverted(first, second, 3, 5, 2, 6),
            *(Inverted(second, second, start, expansion=4) for start in (5, 3, 5, 3)),
        ],
        [
            Inverted(second, third, 5, 5, 2, 6),
            *(Inverted(third, third, 5, expansion=4) for _ in range(7)),
            Inverted(third, third, expansion=1),
        ],
        [Inverted(third, fourth, 5, 5, 2, 6)],
    ]
    for _ in range(14):
        stages[2] += [Attention(third, 12, 64, 2), Inverted(third, third)]
    for _ in range(19):
        stages[3] += [Attention(fourth, 16, 96, 1), Inverted(fourth, fourth)]
    return stages


class Fusion(nn.Module):
    """The last stage, enlarged, beside the one before it; pooled to a square of tokens."""

    def __init__(self, inputs: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.ffn = Inverted(inputs, OUTPUT_CHANNELS, is_block=False)
        self.norm = nn.RMSNorm(OUTPUT_CHANNELS, EPS)

    def __call__(self, larger: mx.array, smaller: mx.array) -> mx.array:
        batch, height, width, _ = larger.shape
        assert height % self.side == 0 == width % self.side, f"{height} x {width} places for {self.side} x {self.side}"
        rows, columns = (
            mx.arange(wanted) * size // wanted for wanted, size in zip((height, width), smaller.shape[1:3], strict=True)
        )
        x = self.ffn(mx.concatenate([larger, smaller[:, rows][:, :, columns]], axis=-1))
        x = x.reshape(batch, self.side, height // self.side, self.side, width // self.side, OUTPUT_CHANNELS)
        return self.norm(x.mean(axis=(2, 4)))


class MobileNet(nn.Module):
    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.conv_stem = Normed(Convolution(3, config.stem_channels, 3, 2, bias=True), True)
        self.blocks = make_stages(config)
        self.msfa = Fusion(config.channels(640) + config.channels(1280), config.side)

    def __call__(self, pixels: mx.array) -> mx.array:
        """(B, height, width, 3), both multiples of 16 * side -> (B, side, side, OUTPUT_CHANNELS)."""
        x, outputs = self.conv_stem(pixels.astype(self.conv_stem.conv.weight.dtype)), []
        for stage in self.blocks:
            for block in stage:
                x = block(x)
            outputs.append(x)
        return self.msfa(*outputs[-2:])


class MobileNetTower(nn.Module):
    """In a module of its own, as the names of checkpoints are."""

    def __init__(self, config: MobileNetConfig) -> None:
        super().__init__()
        self.timm_model = MobileNet(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """One image (height, width, 3) -> (side**2, OUTPUT_CHANNELS), by rows."""
        return self.timm_model(pixels[None])[0].flatten(0, 1)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights by the names that they have in this module."""
        return channels_last(weights, dict(tree_flatten(self.parameters())))
