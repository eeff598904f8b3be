"""Every figure of a machine with GPUs, group by group, within a time limit: for machines that are rented by the minute.

    python -m bench.suite --minutes 9 --gpus 0,1 --out results

Groups are taken in the order given by the next GPU that is free; the tasks of a group run one after another on it. A
task is not begun where the time left is less than it usually takes, and is ended at its limit. Each leaves NAME.json
and NAME.log in the folder; suite.json tells what ran. Each GPU's tasks have cores of their own (`--cores` for a part of
them), and still what runs beside a task on the same host can make it slower: figures that count want `--gpus 0`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import msgspec

from bench import report

LOAD = "--prompt-tokens 128 --output-tokens 128 --ignore-eos"
# MLX hands operations over in lots: a step in one lot, for what the lots cost.
FEW_COMMITS = {"MLX_MAX_OPS_PER_BUFFER": "2000", "MLX_MAX_MB_PER_BUFFER": "100000"}
TRAIN = "bench.train_drafter train --data {out}/documents.npz --quiet --evaluate-every 80 --evaluate-documents 12"


class Task(msgspec.Struct, frozen=True):
    """`command` follows `python -m`; `{out}` is the folder of results. `usual_s`: of an H200 with a host of its own."""

    name: str
    command: str
    usual_s: float
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    has_json: bool = True

    @property
    def limit_s(self) -> float:
        return 2 * self.usual_s


def _family(name: str, shape: str, usual_s: float) -> Task:
    command = f"bench.families --shapes {shape} --output-tokens 64 --repeats 2 --limit {usual_s:.0f}"
    return Task(f"families-{name}", command, usual_s)


def _train(kind: str, more: str) -> Task:
    command = f"{TRAIN} --kind {kind} --from-drafter shared/drafters/{kind} --out {{out}}/{kind} --seconds 240 {more}"
    return Task(f"train-{kind}", command, 300, has_json=False)


GROUPS: dict[str, tuple[Task, ...]] = {
    "steps": (
        Task("steps-8b", "bench.paged --shape 8b --batches 32,8 --agents 0 --layouts slots", 75),
        Task("host-costs-8b", "bench.host_costs --shape 8b", 60),
        Task("host-costs-8b-few-commits", "bench.host_costs --shape 8b --chain 0", 50, FEW_COMMITS),
        Task("attention", "bench.attention --rows 1,8 --batches 8,32,64 --contexts 1024,8192,32768 --no-stock", 60),
    ),
    "paged": (
        Task("paged-8b", "bench.paged --shape 8b --batches 32,8 --layouts paged --attention kernel", 200),
        Task("tokens-8b", "bench.attention_tokens --shape 8b --arms slots/kernel,paged/kernel", 150),
    ),
    "http": (
        Task("checkpoint", "bench.random_checkpoint --shape 8b --out {out}/random-8b", 35, has_json=False),
        Task("ceiling-8b", f"bench.ceiling --model {{out}}/random-8b --concurrency 8,32 {LOAD}", 45),
        Task(
            "serve-8b",
            f"bench.serve --start {{out}}/random-8b --concurrency 32 --num-requests 96 --repeats 2 {LOAD}",
            90,
            {"TANDEM_DRAFT_MODEL": "none"},
        ),
        Task("prefix-8b", "bench.prefix --model {out}/random-8b --turns 20 --turns-without 2", 240),
        Task("adapters-8b", "bench.adapters --model {out}/random-8b", 60),
    ),
    "qwen": (_family("qwen", "qwen3.5-4b", 180),),
    "gemma": (_family("e4b", "gemma4-e4b", 110), _family("26b", "gemma4-26b-a4b", 120)),
    "assistant": (
        Task("assistant-e4b", "bench.synthetic --shape gemma4-e4b --drafter assistant --batches 8", 80),
        Task("assistant-26b", "bench.synthetic --shape gemma4-26b-a4b --drafter assistant --batches 8", 120),
    ),
    "speculation": (Task("synthetic-8b", "bench.synthetic --shape 8b --output-tokens 256", 240),),
    "training": (
        Task("documents", "bench.train_drafter generate --out {out}/documents.npz --seconds 120", 150, has_json=False),
        _train("dflash", "--layers 4 --rate 3e-3"),
        _train("eagle3", "--rate 4e-3 --anchors-per-token 0.5 --inner-size 3072"),
        _train("mtp", "--rate 4e-3 --anchors-per-token 0.5 --draft-tokens 2 --inner-size 3072"),
    ),
    "drafters": (
        Task(
            "drafters",
            "bench.drafters --arms none,null,ngram,dflash,eagle3,mtp --keep-alive --output-tokens 96 --time-budget 400 "
            "--output {out}/drafters.json",
            450,
            has_json=False,
        ),
    ),
}


class Suite:
    """Args:
    out: takes results and logs.
    deadline: `time.monotonic` by which everything has ended.
    """

    def __init__(self, groups: Mapping[str, Sequence[Task]], out: Path, deadline: float) -> None:
        self._waiting: Queue[tuple[str, Sequence[Task]]] = Queue()
        for item in groups.items():
            self._waiting.put(item)
        self._out, self._deadline = out, deadline
        self.ended: list[dict[str, Any]] = []

    def run(self, gpus: Sequence[str], cores: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """What became of each task, in the order of their ends; `cores`, or all, are dealt out to the GPUs evenly."""
        cores = sorted(os.sched_getaffinity(0)) if cores is None else cores
        each = max(1, len(cores) // len(gpus))
        shares = [cores[i * each : (i + 1) * each] or cores for i in range(len(gpus))]
        threads = [threading.Thread(target=self._serve, args=pair) for pair in zip(gpus, shares, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.ended

    def _serve(self, gpu: str, cores: Sequence[int]) -> None:
        os.sched_setaffinity(0, cores)  # of this thread, and so of what it starts
        while True:
            try:
                group, tasks = self._waiting.get_nowait()
            except Empty:
                return
            for task in tasks:
                row = {"group": group, "task": task.name, "gpu": gpu, **self._run(task, gpu)}
                self.ended.append(row)
                print(row, file=sys.stderr, flush=True)

    def _run(self, task: Task, gpu: str) -> dict[str, Any]:
        left = self._deadline - time.monotonic()
        if left < task.usual_s:
            return {"result": "left out", "seconds": 0.0}
        command = [sys.executable, "-m", *shlex.split(task.command.format(out=self._out))]
        if task.has_json:
            command += ["--json", str(self._out / f"{task.name}.json")]
        environment = {**os.environ, **task.environment, "CUDA_VISIBLE_DEVICES": gpu}
        started = time.monotonic()
        with (self._out / f"{task.name}.log").open("wb") as log:
            try:
                done = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=min(left, task.limit_s)
                )
                result = "done" if done.returncode == 0 else f"exit {done.returncode}"
            except subprocess.TimeoutExpired:
                result = "too long"
        return {"result": result, "seconds": round(time.monotonic() - started, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="in this order")
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs to use, side by side")
    parser.add_argument("--cores", help="FIRST-LAST, to leave others to what runs beside; all without it")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    unknown = [name for name in options.groups.split(",") if name not in GROUPS]
    if unknown:
        parser.error(f"no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    groups = {name: GROUPS[name] for name in options.groups.split(",")}
    cores = None
    if options.cores:
        first, last = map(int, options.cores.split("-"))
        cores = sorted(os.sched_getaffinity(0) & {*range(first, last + 1)})
    ended = Suite(groups, out, time.monotonic() + 60 * options.minutes).run(options.gpus.split(","), cores)
    report.write_json(out / "suite.json", {**report.provenance("suite"), "tasks": ended})
    report.print_last_line({"tasks": ended})
    return int(any(row["result"] != "done" for row in ended))


if __name__ == "__main__":
    sys.exit(main())
