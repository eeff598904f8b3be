"""Resident memory of each of Tandem's processes while many short requests pass, and the processor time of an idle one.

Starts a server of its own, plays `--num-requests` completions in a closed loop and reads the resident set size of each
process at the checkpoints. A server that leaks shows it between the first and the last one; a prefix cache that fills
up is no leak (`TANDEM_PREFIX_CACHE=0` leaves it out). Then nothing is asked for `--idle-s`. `python -m bench.memory`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from bench import report
from bench.words import WORDS

READY_S = 300.0
MODULES = {"frontend": "frontend", "scheduler": "scheduler", "workers.target": "target", "workers.drafter": "drafter"}
MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    environment = {**os.environ, "TANDEM_PORT": str(port), "TANDEM_MODEL": options.model, "TANDEM_LOG_LEVEL": "warning"}
    server = subprocess.Popen([sys.executable, "-m", "tandem", "serve"], env=environment, stdout=sys.stderr)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(url, server)
        points = [p for p in options.checkpoints if p < options.num_requests] + [options.num_requests]
        measured = asyncio.run(_play(url, server.pid, points, options))
        idle_share = _idle_share(server.pid, options.idle_s)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=10)
    names = list(MODULES.values())
    rows = [[str(p), *(f"{measured[p][n] / MIB:.1f}" for n in names)] for p in points]
    growth = {n: measured[points[-1]][n] / measured[points[0]][n] - 1 for n in names}
    total = sum(measured[points[-1]].values()) / sum(measured[points[0]].values()) - 1
    print(report.table(["requests", *(f"{n} (MiB)" for n in names)], rows))
    print(f"growth from {points[0]} to {points[-1]} requests: {total:+.2%} in all")
    print(f"idle for {options.idle_s:g} s: {idle_share:.2%} of one core, all processes together")
    result = report.provenance("memory") | {
        "prefix_cache": os.environ.get("TANDEM_PREFIX_CACHE", "1"),
        "idle_share_of_one_core": idle_share,
        "resident_bytes": {str(p): measured[p] for p in points},
        "growth": growth,
        "growth_in_all": total,
    }
    report.finish(result, options.json)
    return 0


def _wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Raises:
    SystemExit: the server ended or is not ready in time.
    """
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


async def _play(url: str, pid: int, points: list[int], options: argparse.Namespace) -> dict[int, dict[str, int]]:
    """Requests in a closed loop, one checkpoint after another; resident bytes by process at each, server idle."""
    measured: dict[int, dict[str, int]] = {}
    rng = random.Random(options.seed)
    done = 0
    limits = httpx.Limits(max_connections=options.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        with tqdm(total=points[-1], unit="request", file=sys.stderr) as progress:
            for point in points:
                bodies = iter([_body(rng, options.max_tokens) for _ in range(point - done)])

                async def client_loop(bodies: Any = bodies) -> None:  # noqa: ANN401 - one iterator that all share
                    for body in bodies:
                        (await client.post("/v1/completions", json=body)).raise_for_status()
                        progress.update()

                await asyncio.gather(*(client_loop() for _ in range(options.concurrency)))
                done = point
                measured[point] = _resident(pid)
    return measured


def _body(rng: random.Random, max_tokens: int) -> dict[str, Any]:
    """Common words: a tokenizer keeps the words it has seen, up to 10,000; random letters would look like a leak."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 16)))
    return {"model": "default", "prompt": prompt, "max_tokens": rng.randint(1, max_tokens), "ignore_eos": True}


def _resident(pid: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for process in psutil.Process(pid).children(recursive=True):
        command = process.cmdline()
        if command[-2:-1] == ["-m"] and command[-1] in MODULES and "shared.supervise" not in command:
            found[MODULES[command[-1]]] = process.memory_info().rss
    return found


def _idle_share(pid: int, seconds: float) -> float:
    """Processor seconds of the whole tree per second, while nothing is asked."""

    def used() -> float:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in tree)

    time.sleep(2.0)  # what the last request left to do is done
    before, started = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - started)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[200, 500, 1000])
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--idle-s", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="keep the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
