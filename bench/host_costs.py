"""What a step costs the host: launches by kind of operation, and building, handing over and waiting for whole steps.

    python -m bench.host_costs --shape 8b --batches 1,8,32 --widths 1,8

Operations are chains of one kind. `build_us` is what Python takes for each, `launch_us` what MLX takes to hand it to
the device, `total_us` the time until the device is done, all by operation: where total and build + launch are near each
other, the host is the limit. Steps: `begin_ms` as the engine begins them, in parts where it does so; the others with
nothing handed over before the end. `queued_ms` is a step with another one queued behind it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import mlx.core as mx

from bench import report
from bench.model_shapes import SHAPES, random_model
from bench.paged import prefill
from bench.synthetic import speculating_engine
from shared.messages import Step, StepRow
from workers import cuda
from workers.arrays import start_evaluating
from workers.engine import Engine
from workers.machine import is_cpu
from workers.models.decoder import swiglu
from workers.own_attention import may_serve_all

CHAIN = 256
REPEATS = 8
HIDDEN, INNER = 4096, 14336
CONTEXT = 512


def operations(batch: int, dtype: mx.Dtype) -> dict[str, tuple[Callable[[mx.array], mx.array], mx.array]]:
    """Name -> (one operation whose output is its next input, the first input)."""
    x = mx.random.normal((batch, HIDDEN)).astype(dtype)
    weight = (mx.random.normal((HIDDEN, HIDDEN)) * 0.01).astype(dtype)
    scale, other = mx.ones((HIDDEN,), dtype), mx.random.normal((batch, HIDDEN)).astype(dtype)
    wide = mx.random.normal((batch, INNER)).astype(dtype)
    mx.eval(x, weight, scale, other, wide)
    return {
        "add": (lambda y: y + other, x),
        "rms_norm": (lambda y: mx.fast.rms_norm(y, scale, 1e-5), x),
        "matmul": (lambda y: y @ weight.T, x),
        "addmm": (lambda y: mx.addmm(other, y, weight.T), x),
        "swiglu": (lambda y: swiglu(y, wide), wide),
    }


def chained(operation: Callable[[mx.array], mx.array], x: mx.array, length: int) -> dict[str, float]:
    """Microseconds of one operation, the best of a few chains."""
    found: list[tuple[float, float, float]] = []
    for _ in range(REPEATS):
        mx.synchronize()
        started = time.perf_counter()
        y = x
        for _ in range(length):
            y = operation(y)
        built = time.perf_counter()
        start_evaluating([y])
        launched = time.perf_counter()
        mx.synchronize()
        found.append((built - started, launched - built, time.perf_counter() - started))
    best = (round(1e6 * min(column) / length, 2) for column in zip(*found, strict=True))
    return dict(zip(("build_us", "launch_us", "total_us"), best, strict=True))


def step_costs(engine: Engine, batch: int, width: int) -> dict[str, Any]:
    """Milliseconds of a step of `width` tokens for each of `batch` sequences that are in the slots."""
    rows = [
        StepRow(slot=s, start=CONTEXT, capacity=2 * CONTEXT, token_ids=[1] * width, num_drafts=width - 1)
        for s in range(batch)
    ]
    step = Step(epoch=0, step_id=0, starts=[], decodes=rows, prefills=[])
    for _ in range(3):
        engine.finish(engine.begin(step))
    times: dict[str, list[float]] = {name: [] for name in ("begin", "whole", "build", "launch", "wait", "queued")}
    for _ in range(REPEATS):
        mx.synchronize()
        started = time.perf_counter()
        pending = engine.begin(step)
        times["begin"].append(time.perf_counter() - started)
        engine.finish(pending)
        times["whole"].append(time.perf_counter() - started)
    with ExitStack() as stack:
        for place in ("early_start", "engine"):  # what hands over a part of a step before its end
            stack.enter_context(mock.patch(f"workers.{place}.start_evaluating"))
        for _ in range(REPEATS):
            mx.synchronize()
            started = time.perf_counter()
            pending = engine.begin(step)
            built = time.perf_counter()
            start_evaluating(pending.pending)
            launched = time.perf_counter()
            mx.synchronize()
            for name, seconds in zip(
                ("build", "launch", "wait"),
                (built - started, launched - built, time.perf_counter() - launched),
                strict=True,
            ):
                times[name].append(seconds)
            engine.finish(pending)
    running = [engine.begin(step)]
    for _ in range(REPEATS):
        started = time.perf_counter()
        running.append(engine.begin(step))
        engine.finish(running.pop(0))
        times["queued"].append(time.perf_counter() - started)
    engine.finish(running.pop())
    named = {f"{name}_ms": round(1000 * median(values), 3) for name, values in times.items()}
    return {"batch": batch, "width": width, **named}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--widths", default="1,8", help="tokens of each sequence")
    parser.add_argument("--chain", type=int, default=CHAIN, help="operations in a row; 0: whole steps only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    cuda.prepare()
    if may_serve_all(SHAPES[options.shape]):
        cuda.leave_out_graphs()
    dtype = "float32" if is_cpu() else "bfloat16"
    batches = [int(batch) for batch in options.batches.split(",")]
    launches = [
        {"operation": name, "rows": batch, **chained(*operation, options.chain)}
        for batch in (batches if options.chain else ())
        for name, operation in operations(batch, getattr(mx, dtype)).items()
    ]
    engine, _ = speculating_engine(random_model(options.shape, dtype))
    steps = []
    for batch in batches:
        prefill(engine, batch, CONTEXT)
        steps += [step_costs(engine, batch, int(width)) for width in options.widths.split(",")]
        engine.reset()
    for rows in (launches, steps):
        if rows:
            print(report.table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    result = {**report.provenance("host_costs"), "shape": options.shape, "launches": launches, "steps": steps}
    report.finish(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
