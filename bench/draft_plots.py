"""Two plots of a result of `bench.drafters`: speed-up against concurrency, acceptance by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, no window
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.draft_arms import NULL, PLAIN
from bench.draft_tables import acceptance, mean_speed_up, model_name, noise, speed_ups

MAX_POSITIONS = 16  # n-gram drafts may be longer; what comes then is seldom tested
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes


def plot(result: Mapping[str, Any], stem: Path) -> list[Path]:
    """Writes STEM-speedup.png and STEM-acceptance.png; returns their paths."""
    names = [arm["name"] for arm in result["arms"] if arm["name"] not in (PLAIN, NULL)]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    title = f"{result['machine']['gpu'] or result['machine']['cpu']}, {model_name(result)}, {result['date'][:10]}"
    return [
        _speed_up_plot(result["cells"], colors, title, stem.with_name(stem.name + "-speedup.png")),
        _acceptance_plot(result["cells"], colors, title, stem.with_name(stem.name + "-acceptance.png")),
    ]


def _speed_up_plot(cells: Sequence[Mapping[str, Any]], colors: Mapping[str, str], title: str, path: Path) -> Path:
    """A panel for each workload and one for their mean. The grey band is the noise: null against plain."""
    workloads = list(dict.fromkeys(c["workload"] for c in cells))
    concurrencies = sorted({c["concurrency"] for c in cells})
    panels: list[str | None] = [*workloads, None]
    num_rows = 2 if len(panels) > 3 else 1
    num_columns = -(-len(panels) // num_rows)
    figure, grid = pyplot.subplots(
        num_rows, num_columns, figsize=(3.8 * num_columns, 3.2 * num_rows), sharex=True, sharey=True, squeeze=False
    )
    apart = noise(cells)
    for axes, workload in zip(grid.flat, panels, strict=False):
        if apart is not None:
            axes.axhspan(1 - apart["max"], 1 + apart["max"], color="0.9", zorder=0)
        axes.axhline(1.0, color="0.4", linewidth=0.8)
        for name, color in colors.items():
            _speed_up_line(axes, cells, name, color, concurrencies, {} if workload is None else {"workload": workload})
        axes.set_xscale("log", base=2)
        axes.set_xticks(concurrencies, [str(c) for c in concurrencies])
        axes.set_title(workload or "all", fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("requests at once")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over plain decoding")
    return _save(figure, grid.flat[0], title, path)


def _speed_up_line(
    axes: Axes,
    cells: Sequence[Mapping[str, Any]],
    name: str,
    color: str,
    concurrencies: Sequence[int],
    where: Mapping[str, object],
) -> None:
    """The mean over repeats, with the range where there are several."""
    points = [(c, mean_speed_up(cells, name, concurrency=c, **where)) for c in concurrencies]
    known = [(c, mean) for c, mean in points if mean is not None]
    ranges = [speed_ups(cells, name, concurrency=c, **where) for c, _ in known]
    axes.plot([c for c, _ in known], [m for _, m in known], color=color, marker="o", markersize=3, label=name)
    axes.vlines([c for c, _ in known], [min(r) for r in ranges], [max(r) for r in ranges], color=color, alpha=0.35)


def _acceptance_plot(cells: Sequence[Mapping[str, Any]], colors: Mapping[str, str], title: str, path: Path) -> Path:
    """All workloads and concurrencies of an arm together."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for name, color in colors.items():
        length, shares = acceptance(cells, name)
        if length is not None:
            shares = shares[:MAX_POSITIONS]
            label = f"{name} (mean length {length:.2f})"
            axes.plot(range(1, len(shares) + 1), shares, color=color, marker="o", markersize=3, label=label)
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("share of drafts accepted up to here")
    return _save(figure, axes, title, path)


def _save(figure: Any, labelled: Axes, title: str, path: Path) -> Path:  # noqa: ANN401 - pyplot's figures are untyped
    handles, labels = labelled.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
