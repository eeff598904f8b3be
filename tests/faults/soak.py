"""The long runs: `python -m tests.faults.soak --kills 200` and `--minutes 60`. Figures go to a file of bench/results.

With `--kills` random processes get `kill -9` under load, each as soon as streams go on. With `--minutes` nothing
is killed, a fifth of the clients leave half-way, and the memory of each process is read every ten seconds. Both check
each stream against the undisturbed tokens and end with an error where one differs or something is left over.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from bench import report
from tests.faults.load import Footprint, Load, check_nothing_leaked, orphaned_shared_memory
from tests.faults.test_kills import MODULES, SETTINGS, send
from tests.support import tiny_model
from tests.support.server import READY_S, Server

PROCESSES = ("frontend", *MODULES)
SAMPLE_S = 10.0
ABANDONED = 0.2
MAX_GROWTH = 0.03


def main() -> int | str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--warm-up", type=float, default=2.0, help="minutes before memory counts")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-minutes", type=float, default=60.0, help="of the kills")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model.write(folder / "model")
        eagle = tiny_model.write_eagle3(folder / "eagle", model)
        shared_memory = orphaned_shared_memory()
        with Server(model, folder, draft_model=eagle, **SETTINGS) as server:
            server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
            figures = kills(server, options) if options.kills else soak(server, options)
        assert orphaned_shared_memory() <= shared_memory
    result = {**report.provenance("soak"), **figures}
    result["command"] = " ".join(["python", "-m", "tests.faults.soak", *sys.argv[1:]])
    if options.out is not None:
        report.write_json(options.out, result)
    report.print_last_line(figures)
    growth = figures.get("growth_after_warm_up", {})
    return 0 if all(g < MAX_GROWTH for g in growth.values()) else f"memory grows: {growth}"


def kills(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(1)
    load = Load(server, options.concurrency)
    check_nothing_leaked(server)
    before = Footprint.of(server)
    killed: Counter[str] = Counter()
    pauses: list[float] = []
    started = time.monotonic()
    with load:
        load.wait_progress()
        while sum(killed.values()) < options.kills and time.monotonic() - started < 60 * options.max_minutes:
            victim = rng.choice(MODULES)
            send(server, victim, signal.SIGKILL)
            killed[victim] += 1
            pauses.append(load.wait_progress())
            load.wait_progress(4 * options.concurrency)  # so that streams get on between two kills
    seconds = time.monotonic() - started
    load.check(options.concurrency)
    check_nothing_leaked(server, before)
    return {
        "kills": dict(killed), "num_kills": sum(killed.values()), "num_streams": load.num_finished,
        "num_streams_that_differ": len(load.failures), "concurrency": options.concurrency, "seconds": seconds,
        "until_streams_go_on_s": report.spread(pauses), "left_over": "nothing: " + str(before),
    }  # fmt: skip


def memory(server: Server) -> dict[str, int]:
    return {module: server.worker(module).memory_info().rss for module in PROCESSES}


def soak(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    samples: list[tuple[float, dict[str, int]]] = []
    load = Load(server, options.concurrency, abandoned=ABANDONED)
    started = time.monotonic()
    with load:
        while (elapsed := time.monotonic() - started) < 60 * options.minutes:
            samples.append((elapsed, memory(server)))
            time.sleep(SAMPLE_S)  # the measurement's own rhythm
    load.check(options.concurrency)
    check_nothing_leaked(server)
    warm = [m for at, m in samples if at >= 60 * options.warm_up]
    tenth = max(1, len(warm) // 10)
    growth = {p: _mean(warm[-tenth:], p) / _mean(warm[:tenth], p) - 1 for p in PROCESSES}
    return {
        "minutes": options.minutes, "num_streams": load.num_finished, "num_abandoned": load.num_abandoned,
        "concurrency": options.concurrency, "growth_after_warm_up": growth, "last_resident_bytes": warm[-1],
        "samples": [(round(at), m) for at, m in samples],
    }  # fmt: skip


def _mean(samples: list[dict[str, int]], process: str) -> float:
    return sum(sample[process] for sample in samples) / len(samples)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except psutil.Error as error:
        sys.exit(f"a process that should run does not: {error}")
