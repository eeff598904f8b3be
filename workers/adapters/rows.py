"""Which adapter each row of a forward has, and the layer that adds what the adapters learned."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel


class Adapters:
    """What the adapted layers of one model have in common. All adapters' ranks lie side by side, R columns in all.

    Args:
        ranks: of each adapter by name; each owns so many columns, in this order.
        fingerprints: by name; two equal ones compute the same.
    """

    def __init__(self, ranks: Mapping[str, int], fingerprints: Mapping[str, str]) -> None:
        self.fingerprints = dict(fingerprints)
        self.names = list(ranks)
        self._index = {name: i for i, name in enumerate(self.names, start=1)}
        owners = [self._index[name] for name, rank in ranks.items() for _ in range(rank)]
        numbers = mx.arange(len(ranks) + 1)[:, None]  # 0: no adapter
        self._owned = numbers == mx.array(owners)[None]  # (num_adapters + 1, R)
        self.columns: mx.array | None = None  # of the forward being built: (B, 1, R) or (1, T, R); None: no row has any

    def select(self, names: Sequence[str], widths: Sequence[int] | None = None) -> None:
        """Say whose rows the next forward has.

        Args:
            names: of the rows' adapters; "" for none.
            widths: where rows are packed one behind another: each one's tokens. None: one batch row each.
        """
        if not any(names):
            self.columns = None
            return
        numbers = [0 if not name else self._index[name] for name in names]
        if widths is None:
            self.columns = self._owned[mx.array(numbers)][:, None]
        else:
            tokens = [number for number, width in zip(numbers, widths, strict=True) for _ in range(width)]
            self.columns = self._owned[mx.array(tokens)][None]


class AdaptedLinear(nn.Module):
    """A linear layer and what adapters add to it: y = W x + B A x, for each row with its own A and B.

    Args:
        linear: (..., in) -> (..., out), plain or quantised.
        lora_a: (in, R), the adapters' side by side.
        lora_b: (R, out), with their scales.
        adapters: says which columns a row keeps.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, adapters: Adapters) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self._adapters = adapters

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        columns = self._adapters.columns
        if columns is None:
            return y
        if x.ndim != 3:
            raise BadModel(f"adapters: a layer whose input has {x.ndim} axes in place of (batch, tokens, in)")
        # Not a product with 0: another adapter's column may be infinite where this row's numbers are not meant for it.
        return y + mx.where(columns, x @ self.lora_a, 0) @ self.lora_b
