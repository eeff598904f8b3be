"""Calls a model for the engine: one forward, and the head for the rows that are sampled only.

Tandem's own models split `hidden` from `logits`; an mlx-lm architecture gives logits for every position, so there the
"hidden rows" are rows of logits and the head does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from shared.errors import BadModel
from workers.features import install_taps
from workers.kv_taps import KeysValues, as_rows, install_kv_taps


class ModelRunner:
    """Args:
    model: `model(inputs, cache=..., input_embeddings=...) -> logits`; with `hidden` and `logits` where it can.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any architecture that mlx-lm defines
        self.model = model
        self._is_split = hasattr(model, "hidden") and hasattr(model, "logits")
        self._fusion: Callable[[Sequence[mx.array]], mx.array] | None = None
        self._taps: Sequence[int] = ()
        self._captured: dict[int, mx.array] = {}
        self._kv_layers: Sequence[int] = ()
        self._keys_values: dict[int, KeysValues] = {}
        self._final: mx.array | None = None

    def capture(
        self,
        taps: Sequence[int],
        fusion: Callable[[Sequence[mx.array]], mx.array],
        kv_layers: Sequence[int] = (),
    ) -> None:
        """From now on keep each forward's hidden states for `features`.

        Args:
            taps: zero-based blocks whose output is wanted; none means the rows after the final norm.
            fusion: captured arrays (N, H) each -> rows (N, H_drafter).
            kv_layers: blocks whose keys and values are wanted too, behind the hidden rows.
        Raises:
            BadModel: this architecture does not let them be seen.
        """
        if not taps and not self._is_split:
            raise BadModel(
                f"{type(self.model).__module__} does not show its final hidden rows; this drafter needs them"
            )
        if taps:
            self._captured = install_taps(self.model, taps)
        if kv_layers:
            self._keys_values = install_kv_taps(self.model, kv_layers)
        self._kv_layers = kv_layers
        self._taps, self._fusion = taps, fusion

    @property
    def captures(self) -> bool:
        return self._fusion is not None

    def features(self) -> mx.array | None:
        """The last forward's fused rows (B, L, H_drafter), lazy; None when nothing is captured."""
        if self._fusion is None:
            return None
        captured = [self._captured[t] for t in self._taps] if self._taps else [self._final]
        first = captured[0]
        assert first is not None, "features before a forward"
        rows = [c.reshape(-1, c.shape[-1]) for c in captured if c is not None]
        rows += [as_rows(states) for layer in self._kv_layers for states in self._keys_values[layer]]
        fused = self._fusion(rows)
        return fused.reshape(first.shape[0], first.shape[1], -1)

    def hidden_rows(
        self,
        inputs: mx.array,
        cache: Sequence[object],
        wanted: Sequence[tuple[int, int]],
        media: Mapping[str, mx.array | int] | None = None,
    ) -> mx.array:
        """One forward over inputs (B, L).

        Args:
            wanted: (first, end) spans of the B * L tokens.
            media: what a `MediaModel` gets beside its tokens.
        Returns:
            (n, H): the wanted positions' rows, in order.
        """
        call = self.model.hidden if self._is_split else self.model
        out: mx.array = call(inputs, cache=cache, **(media or {}))
        self._final = out
        rows = out.reshape(-1, out.shape[-1])
        if not wanted:
            return rows[:0]
        length = inputs.shape[1]
        places = {(first % length, end - first) for first, end in wanted}
        if len(places) == 1 and len(wanted) == inputs.shape[0]:  # the same part of every row
            first, num = places.pop()
            return out[:, first : first + num].reshape(-1, out.shape[-1])
        return rows[mx.array([i for first, end in wanted for i in range(first, end)])]

    @property
    def shows_hidden(self) -> bool:
        """Whether `final_rows` has anything: an mlx-lm architecture gives logits only."""
        return self._is_split

    def final_rows(self) -> mx.array:
        """The last forward's rows after the final norm (B * L, H), lazy."""
        assert self._is_split and self._final is not None, "hidden rows of a model that hides them, or before a forward"
        return self._final.reshape(-1, self._final.shape[-1])

    def head(self, rows: mx.array) -> mx.array:
        """Logits (n, V) of hidden rows (n, H)."""
        if not self._is_split:
            return rows
        logits: mx.array = self.model.logits(rows)
        return logits
