"""The layouts of keys and values on a model of a real shape: what steps take, and what agents with one prefix share.

    python -m bench.paged --shape 8b --batches 8,32 --json result.json

Each layout is a process of its own. `decode_ms` is a step of one token a row with the next one queued behind it, as
the target runs them; `verify_ms` one of 8 tokens a row that the host waits for, and `queued_verify_ms` the same with
another behind it. Shared: agents whose prompts have all but their last tokens in common, in the paged layout; blocks
held at the most, by all of them and by one alone, the time to give a slot its cached prefix (`restore_ms`), and from
the beginning of the step that does so for one sequence to its first token (`hit_ms`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench import report
from bench.model_shapes import SHAPES, random_model
from bench.synthetic import Loop
from shared.config import Settings
from shared.messages import RequestId, SamplingParams, SequenceStart, Step, StepResult, StepRow, WorkerInfo
from workers import cuda
from workers.build import make_engine, warm_up
from workers.cache.paged import PagedStore
from workers.engine import Engine, PendingStep
from workers.machine import is_cpu
from workers.own_attention import may_serve_all

STEPS = 40
VERIFIED = 8
HITS = 5


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One layout. MLX's switches are read once, so this process measures nothing else."""
    cuda.prepare()
    if may_serve_all(SHAPES[options.shape]):
        cuda.leave_out_graphs()
    mx.random.seed(0)
    longest = options.shared + options.context + 512
    loaded = random_model(options.shape, "float32" if is_cpu() else "bfloat16", longest)
    settings = Settings(
        max_num_seqs=max(*options.batches, options.agents), max_model_len=longest,
        max_num_batched_tokens=2048, kv_layout=options.layout, attention=options.attention, draft_model="ngram",
    )  # fmt: skip
    engine, info = make_engine(loaded, settings)
    warm_up(engine, info)
    rows = []
    for batch in options.batches:
        rows.append({"batch": batch, "context": options.context, **step_times(engine, batch, options.context)})
        engine.reset()
    found: dict[str, Any] = {"layout": options.layout, "attention": list(info.attention), "steps": rows}
    if isinstance(engine.store, PagedStore) and options.agents:
        found["shared"] = sharing(engine, info, options.agents, options.shared)
    return found


def step_times(engine: Engine, batch: int, context: int) -> dict[str, float]:
    """Milliseconds of steps over `batch` sequences of `context` tokens."""
    prefill(engine, batch, context)
    first = engine.begin(decode(batch, context, is_first=True))
    engine.finish(first)
    times = []
    running = [engine.begin(decode(batch, context + 1))]
    for i in range(STEPS):
        started = time.perf_counter()
        running.append(engine.begin(decode(batch, context + 2 + i)))
        engine.finish(running.pop(0))
        times.append(time.perf_counter() - started)
    engine.finish(running.pop())
    at = context + STEPS + 2
    waited, queued = [], []
    for _ in range(STEPS // 2):
        started = time.perf_counter()
        engine.finish(engine.begin(verify(batch, at)))
        waited.append(time.perf_counter() - started)
    running = [engine.begin(verify(batch, at))]
    for _ in range(STEPS // 2):
        started = time.perf_counter()
        running.append(engine.begin(verify(batch, at)))
        engine.finish(running.pop(0))
        queued.append(time.perf_counter() - started)
    engine.finish(running.pop())
    named = {"decode_ms": times, "verify_ms": waited, "queued_verify_ms": queued}
    return {name: round(1000 * sorted(values)[len(values) // 2], 3) for name, values in named.items()}


def prefill(engine: Engine, batch: int, context: int) -> None:
    greedy = SamplingParams(temperature=0.0)
    for slot in range(batch):
        tokens = [(7 * slot + i) % 500 for i in range(context)]
        start = SequenceStart(
            slot=slot, request_id=RequestId(f"r{slot}"), sampling=greedy, num_prompt_tokens=context, token_ids=tokens
        )
        row = StepRow(slot=slot, start=0, capacity=context + 256, token_ids=tokens)
        engine.finish(engine.begin(Step(epoch=0, step_id=0, starts=[start], decodes=[], prefills=[row])))


def decode(batch: int, at: int, *, is_first: bool = False) -> Step:
    """One token a row at position `at`: the one that the step before drew."""
    tokens = [1] if is_first else None
    rows = [StepRow(slot=slot, start=at, capacity=at + 64, token_ids=tokens) for slot in range(batch)]
    return Step(epoch=0, step_id=0, starts=[], decodes=rows, prefills=[])


def verify(batch: int, at: int) -> Step:
    tokens, k = [1] * VERIFIED, VERIFIED - 1
    rows = [StepRow(slot=s, start=at, capacity=at + 64, token_ids=tokens, num_drafts=k) for s in range(batch)]
    return Step(epoch=0, step_id=0, starts=[], decodes=rows, prefills=[])


def sharing(engine: Engine, info: WorkerInfo, agents: int, length: int) -> dict[str, Any]:
    """Agents with one prompt of `length` tokens, after one of them has had it alone."""
    store, blocks = engine.store, engine.blocks
    assert isinstance(store, PagedStore) and blocks is not None, "the paged layout with a prefix cache"
    held, restores = Peak(lambda: store.tables[None].num_used), []
    restore, begin, finish = blocks.restore, engine.begin, engine.finish
    begun: dict[int, float] = {}  # steps of one sequence with a prefix -> when
    hits: list[float] = []

    def timed(slot: int, block_ids: Sequence[int], state_id: int | None) -> None:
        started = time.perf_counter()
        restore(slot, block_ids, state_id)
        mx.eval(store.pending())
        restores.append(1000 * (time.perf_counter() - started))

    def watched(step: Step) -> PendingStep:
        if len(step.starts) == 1 and step.starts[0].restore and not step.decodes:
            begun[step.step_id] = time.perf_counter()
        pending = begin(step)
        held.look()
        return pending

    def finished(pending: PendingStep) -> StepResult:
        result = finish(pending)
        started = begun.pop(result.step_id, None)
        if started is not None:
            hits.append(1000 * (time.perf_counter() - started))
        return result

    blocks.restore, engine.begin, engine.finish = timed, watched, finished  # type: ignore[method-assign]
    try:
        loop = Loop(engine, info)
        loop.run(1, 32, length)
        alone = held.take()
        loop.run(agents, 32, length)
        together = held.take()
        for _ in range(HITS):
            loop.run(1, 2, length)
    finally:
        blocks.restore, engine.begin, engine.finish = restore, begin, finish  # type: ignore[method-assign]
    assert len(restores) >= agents, f"{len(restores)} of {agents} agents found the prefix"
    return {
        "agents": agents, "prompt_tokens": length, "blocks_alone": alone, "blocks_together": together,
        "memory_of_one": together / alone, "restore_ms": round(sorted(restores)[len(restores) // 2], 3),
        "hit_ms": round(sorted(hits)[len(hits) // 2], 3),
    }  # fmt: skip


class Peak:
    """The largest value of something that is looked at now and then."""

    def __init__(self, value: Callable[[], int]) -> None:
        self._value = value
        self._most = 0

    def look(self) -> None:
        self._most = max(self._most, self._value())

    def take(self) -> int:
        most, self._most = self._most, 0
        return most


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layouts", default="slots,paged")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--attention", choices=("auto", "stock", "kernel"), default="auto")
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--agents", type=int, default=8, help="that share a prefix; 0: leave that out")
    parser.add_argument("--shared", type=int, default=16384, help="tokens of their prompt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    options.batches = [int(b) for b in options.batches.split(",")]
    if options.layout is not None:
        report.print_last_line(run(options))
        return 0
    found = []
    for layout in options.layouts.split(","):
        command = [sys.executable, "-m", "bench.paged", "--layout", layout, *(argv or sys.argv[1:])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            found.append({"layout": layout, "error": f"exit {done.returncode}"})
            continue
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    result = {**report.provenance("paged"), "shape": options.shape, "layouts": found}
    report.finish(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
