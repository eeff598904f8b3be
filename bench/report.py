"""Percentiles, tables, machine facts and result files, for every script here."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 99)
PACKAGES = ("mlx", "mlx-cpu", "mlx-cuda-13", "mlx-cuda-12", "mlx-lm", "mlx-vlm", "transformers", "httpx")
REPOSITORY = Path(__file__).resolve().parent.parent


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks (NumPy's default).

    Raises:
        ValueError: no values, or percent outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """min, mean, p50, p90, p99 and count; None without values (a 0 would read as a measurement)."""
    if not values:
        return None
    result = {"min": min(values), "mean": sum(values) / len(values)}
    result |= {f"p{p}": percentile(values, p) for p in PERCENTILES}
    return result | {"count": len(values)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def seconds(value: float | None) -> str:
    """Three digits that matter: `12.3 ms` or `1.23 s`; a dash for None."""
    if value is None:
        return "-"
    return f"{value * 1000:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, GPU, system: what a figure depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpu": gpu(),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
    }


def gpu() -> str | None:
    """Name and driver of the NVIDIA GPUs, on one line; None without any."""
    found = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return None if found is None else described(found.splitlines())


def described(gpus: list[str]) -> str:
    """["H100, 580", "H100, 580"] -> "2 of H100, 580"."""
    counted = {gpu: gpus.count(gpu) for gpu in gpus}
    return "; ".join(gpu if number == 1 else f"{number} of {gpu}" for gpu, number in counted.items())


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter to a figure."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance(benchmark: str) -> dict[str, Any]:
    """The head of every result file."""
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]),
        "is_modified": bool(_output(["git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no"])),
        "command": shlex.join(["python", "-m", f"bench.{benchmark}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
    }


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(target)


def print_last_line(result: Mapping[str, Any]) -> None:
    """The result as one line of JSON, the last on standard output."""
    print(json.dumps(result), flush=True)


def finish(result: Mapping[str, Any], path: str | Path | None) -> None:
    """The end of a benchmark: the result in a file where one is asked for, and as the last line."""
    if path:
        write_json(path, result)
    print_last_line(result)


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
