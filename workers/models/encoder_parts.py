"""What image encoders of several families are made of."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

ACTIVATIONS = ("quick_gelu", "gelu_pytorch_tanh", "gelu", "silu")


def activate(x: mx.array, name: str) -> mx.array:
    """By a name of `ACTIVATIONS`, as configurations have them."""
    match name:
        case "quick_gelu":
            return x * mx.sigmoid(1.702 * x)
        case "gelu_pytorch_tanh":
            return nn.gelu_approx(x)
        case "gelu":
            return nn.gelu(x)
        case _:
            return nn.silu(x)


def squares(x: mx.array, size: int) -> mx.array:
    """(B, rows, columns, C) -> (B, rows / size, columns / size, size * size, C): a square's features row by row."""
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // size, size, columns // size, size, channels).swapaxes(2, 3)
    return x.reshape(batch, rows // size, columns // size, size * size, channels)


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(activate(self.gate_proj(x), self.activation) * self.up_proj(x))
