"""Figures and tables out of the cells of `bench.drafters`. Pure functions of the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import report
from bench.draft_arms import NULL, PLAIN

Cells = Sequence[Mapping[str, Any]]
VERDICTS = ("tie", "other", "unresolved", "unchecked")


def overview(result: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of a result: noise, speed-up by arm and concurrency, acceptance by arm, parity by arm."""
    cells: Cells = result["cells"]
    names = [arm["name"] for arm in result["arms"]]
    concurrencies = list(dict.fromkeys(c["concurrency"] for c in cells))
    workloads = list(dict.fromkeys(c["workload"] for c in cells))
    return {
        "noise": noise(cells),
        "speed_up": {
            name: {str(c): _rounded(mean_speed_up(cells, name, concurrency=c)) for c in concurrencies}
            for name in names if name != PLAIN
        },
        "mean_acceptance_length": {
            name: {w: _rounded(acceptance(cells, name, workload=w)[0]) for w in workloads} for name in names
        },
        "parity": {name: parity(cells, name) for name in names if name != PLAIN},
    }  # fmt: skip


def speed_ups(cells: Cells, arm: str, **where: object) -> list[float]:
    """Output tokens per second over those of the plain arm in the same cell and repeat, for each such pair."""
    plain = {_place(c): c["summary"]["output_tokens_per_s"] for c in cells if c["arm"] == PLAIN}
    ratios = []
    for cell in _of(cells, arm, where):
        own, base = cell["summary"]["output_tokens_per_s"], plain.get(_place(cell))
        if own and base:
            ratios.append(own / base)
    return ratios


def mean_speed_up(cells: Cells, arm: str, **where: object) -> float | None:
    """Geometric mean; None without a pair."""
    ratios = speed_ups(cells, arm, **where)
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def noise(cells: Cells) -> dict[str, float] | None:
    """How far two plain servers are apart: mean and largest |ratio - 1| over cells; None without the null arm."""
    apart = [abs(ratio - 1) for ratio in speed_ups(cells, NULL)]
    return {"mean": sum(apart) / len(apart), "max": max(apart), "count": len(apart)} if apart else None


def acceptance(cells: Cells, arm: str, **where: object) -> tuple[float | None, list[float]]:
    """(mean acceptance length, share of drafts accepted at each position) over all rounds with drafts of the cells."""
    found = [c["speculation"] for c in _of(cells, arm, where) if c["speculation"]]
    num_drafts = sum(s["num_drafts"] for s in found)
    if not num_drafts:
        return None, []
    accepted: dict[int, float] = {}
    for speculation in found:
        for position, number in speculation["accepted_at"].items():
            accepted[int(position)] = accepted.get(int(position), 0.0) + number
    last = max((p for p, n in accepted.items() if n), default=-1)
    length = 1 + sum(s["num_accepted_tokens"] for s in found) / num_drafts
    return length, [accepted.get(p, 0.0) / num_drafts for p in range(last + 1)]


def drafted_share(cells: Cells, arm: str, **where: object) -> float | None:
    """Share of the output tokens that came from rounds with drafts: the policy drafts only where it pays."""
    chosen = [c for c in _of(cells, arm, where) if c["speculation"]]
    tokens = sum(c["summary"]["output_tokens"] for c in chosen)
    drafted = sum(c["speculation"]["num_drafts"] + c["speculation"]["num_accepted_tokens"] for c in chosen)
    return min(1.0, drafted / tokens) if tokens else None


def parity(cells: Cells, arm: str, **where: object) -> dict[str, int] | None:
    """Answers compared, identical, and those that differ by verdict; None where nothing was compared."""
    found = [c["parity"] for c in _of(cells, arm, where) if "parity" in c]
    names = ("compared", "identical", *VERDICTS)
    return {name: sum(p.get(name, 0) for p in found) for name in names} if found else None


def _of(cells: Cells, arm: str, where: Mapping[str, object]) -> Iterable[Mapping[str, Any]]:
    return (c for c in cells if c["arm"] == arm and all(c[k] == v for k, v in where.items()))


def _place(cell: Mapping[str, Any]) -> tuple[object, ...]:
    return cell["repeat"], cell["workload"], cell["concurrency"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# ---------------------------------------------------------------- Markdown


def markdown(result: Mapping[str, Any]) -> str:
    """Speed-up by concurrency, then by workload; acceptance; parity; every cell."""
    cells: Cells = result["cells"]
    machine, settings = result["machine"], result["settings"]
    names = [arm["name"] for arm in result["arms"]]
    workloads = list(dict.fromkeys(c["workload"] for c in cells))
    concurrencies = sorted({c["concurrency"] for c in cells})
    lines = [
        f"# Drafters, {result['date']}",
        "",
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores; {_model(result)}; commit {result['commit']}"
        f"{' with changes' if result['is_modified'] else ''}.",
        f"`{result['command']}`",
        "",
        f"{settings['repeats']} repeats, at least {settings['requests_per_cell']} requests a cell and "
        f"{settings.get('waves', 1)} a client, up to "
        f"{settings['output_tokens']} output tokens each"
        f"{', half of it less or more' if settings.get('vary_output') else ''}"
        f"{', end tokens ignored' if settings['ignore_eos'] else ''}; "
        + ("each cell went round all arms." if result["is_interleaved"] else "one server after another."),
        _noise_line(result),
    ]
    lines += [f"- {name} failed: {reason}" for name, reason in result["failed"].items()]
    if result["left_out"]:
        lines += [f"- {len(result['left_out'])} cells were left out, the time was over."]
    others = [name for name in names if name != PLAIN]
    header = ["arm", *(f"c={c}" for c in concurrencies)]
    rows = [[PLAIN, *(_rate(cells, PLAIN, concurrency=c) for c in concurrencies)]]
    rows += [[name, *(_speed_up(cells, name, concurrency=c) for c in concurrencies)] for name in others]
    lines += ["", "## Speed-up by concurrency", "", "Geometric mean over workloads and repeats; plain: tokens/s.", ""]
    lines += [report.table(header, rows)]
    for workload in workloads:
        rows = [[PLAIN, *(_rate(cells, PLAIN, workload=workload, concurrency=c) for c in concurrencies)]]
        rows += [
            [name, *(_speed_up(cells, name, workload=workload, concurrency=c) for c in concurrencies)]
            for name in others
        ]
        lines += ["", f"### {workload}", "", report.table(header, rows)]
    lines += ["", "## Acceptance", "", "Mean acceptance length (the target's token counted) in rounds with drafts.", ""]
    header = ["arm", *workloads, "all", "tokens from such rounds", "accepted by position"]
    rows = [
        [name, *(_length(cells, name, workload=w) for w in workloads), _length(cells, name),
         _percent(drafted_share(cells, name)), " ".join(f"{share:.2f}" for share in acceptance(cells, name)[1]) or "-"]
        for name in others if acceptance(cells, name)[0] is not None
    ]  # fmt: skip
    lines += [report.table(header, rows) if rows else "No arm drafted."]
    lines += ["", "## Parity with plain decoding", "", *_parity_lines(result, others)]
    lines += ["", "## Cells", "", "Means over repeats; latencies are medians.", "", _cell_table(cells, names)]
    return "\n".join(lines) + "\n"


def model_name(result: Mapping[str, Any]) -> str:
    """As a server calls it, else as it was asked for."""
    return str(next((h["model"] for h in result["health"].values() if h.get("model")), result["model"]))


def _model(result: Mapping[str, Any]) -> str:
    exactness = next((h["exactness"] for h in result["health"].values() if h.get("exactness")), None)
    name = model_name(result)
    if exactness is None:
        return name
    return f"{name} (verify and decode differ by up to {exactness['max_logit_difference']:.2g} in a logit)"


def _noise_line(result: Mapping[str, Any]) -> str:
    found = result["overview"]["noise"] if "overview" in result else noise(result["cells"])
    if found is None:
        return "No null arm was played, so the noise is not known."
    return (
        f"Noise: a second plain server is {found['mean']:.1%} from the first on average, {found['max']:.1%} at most "
        f"({found['count']} pairs)."
    )


def _parity_lines(result: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    rows = []
    for name in names:
        counts = parity(result["cells"], name)
        if counts is not None:
            share = counts["identical"] / counts["compared"] if counts["compared"] else None
            rows.append([name, _percent(share), *(str(counts[k]) for k in ("compared", "identical", *VERDICTS))])
    if not rows:
        return ["Nothing to compare with."]
    bound = result["settings"]["tie_bound"]
    return [
        report.table(["arm", "identical", "compared", "identical", "ties", "others", "unresolved", "unchecked"], rows),
        "",
        f"Tie: at the first difference the plain model's two log-probabilities are at most {bound} nats apart. "
        "Unresolved: asked again, the plain server parted before that place.",
    ]


def _cell_table(cells: Cells, names: Sequence[str]) -> str:
    header = ["workload", "c", "arm", "tok/s", "speed-up", "TTFT", "ITL", "TPOT", "accepted length", "drafted", "equal"]
    rows = []
    places = dict.fromkeys((c["workload"], c["concurrency"]) for c in cells)
    for workload, concurrency in places:
        where = {"workload": workload, "concurrency": concurrency}
        for name in names:
            own = list(_of(cells, name, where))
            if not own:
                continue
            counts = parity(cells, name, **where)
            rows.append(
                [workload, str(concurrency), name, _rate(cells, name, **where),
                 "-" if name == PLAIN else _speed_up(cells, name, **where),
                 *(report.seconds(_median(own, key)) for key in ("ttft_s", "itl_s", "tpot_s")),
                 _length(cells, name, **where), _percent(drafted_share(cells, name, **where)),
                 f"{counts['identical']}/{counts['compared']}" if counts else "-"]
            )  # fmt: skip
    return report.table(header, rows)


def _median(cells: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [c["summary"][key]["p50"] for c in cells if c["summary"][key]]
    return sum(values) / len(values) if values else None


def _rate(cells: Cells, arm: str, **where: object) -> str:
    rates = [c["summary"]["output_tokens_per_s"] for c in _of(cells, arm, where) if c["summary"]["output_tokens_per_s"]]
    return f"{sum(rates) / len(rates):.1f}" if rates else "-"


def _speed_up(cells: Cells, arm: str, **where: object) -> str:
    """The mean, and the range where there are several."""
    ratios = speed_ups(cells, arm, **where)
    if not ratios:
        return "-"
    mean = f"{mean_speed_up(cells, arm, **where):.2f}"
    return mean if len(ratios) == 1 else f"{mean} ({min(ratios):.2f}-{max(ratios):.2f})"


def _length(cells: Cells, arm: str, **where: object) -> str:
    length = acceptance(cells, arm, **where)[0]
    return "-" if length is None else f"{length:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
