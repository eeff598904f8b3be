"""Lets a GPU begin a forward while Python still builds the rest of it.

A step is built as a graph and handed over at its end. Behind another step that costs nothing, and handing it over in
parts would cost the host time; but a step that verifies drafts begins when the device has nothing to do, so building
and computing add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.arrays import start_evaluating
from workers.features import TapLayer, block_list

# Blocks. 2 are about as good, 8 half as good (8B shape, one H100); handing over costs the host 23 us each time (H200).
EVERY = 4


@dataclass
class Starts:
    """The switch of a model's `StartLayer`s: on while the device has nothing else to do."""

    is_on: bool = True


class StartLayer(TapLayer):
    """Stands in for one block of the model and hands over what was built up to its output."""

    def __init__(self, layer: Any, starts: Starts) -> None:  # noqa: ANN401 - any mlx-lm block
        super().__init__(layer, {}, 0)
        self._starts = starts

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - passed through
        out = super().__call__(*arguments, **keywords)
        if self._starts.is_on:
            start_evaluating([self._sink[self._index]])
        return out


def install_starts(model: Any, every: int = EVERY) -> Starts:  # noqa: ANN401 - any architecture
    """Hand over after every so many blocks while the switch is on; the last ones go with the head.

    Switches nothing in a model whose blocks are not where mlx-lm's convention has them.
    """
    starts = Starts()
    layers = block_list(model) or []
    for i in range(every - 1, len(layers) - 1, every):
        layers[i] = StartLayer(layers[i], starts)
    return starts
