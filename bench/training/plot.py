"""Validation curves as a picture, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(path: Path, title: str, curve: Sequence[dict[str, Any]]) -> bool:
    """Acceptance by position and mean acceptance length against answer tokens; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [p for p in curve if "mean_acceptance_length" in p]
    tokens = [p["answer_tokens"] / 1e6 for p in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.plot(tokens, [p["mean_acceptance_length"] for p in points], marker="o")
    left.set(xlabel="answer tokens trained on (millions)", ylabel="mean acceptance length", title=title)
    for j in range(len(points[0]["by_position"]) if points else 0):
        right.plot(tokens, [p["by_position"][j] for p in points], marker=".", label=f"draft {j + 1}")
    right.set(xlabel="answer tokens trained on (millions)", ylabel="accepted, given those before", title="by position")
    if points:
        right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
