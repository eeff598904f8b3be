"""A family's real shape with random weights: our engine beside mlx-lm's own definition, without servers.

    python -m bench.families --shapes qwen3.5-4b,gemma4-e4b --json result.json

Each arm is a process of its own, since MLX reads its switches once: `tandem` is the scheduler core and the engine as
the target process runs them, `mlx-lm` its BatchGenerator. Decoding is output tokens/s while all rows run; prefill the
time to the first token of one prompt. `verify_over_step` is what a step of so many rows of one sequence takes over a
step of one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from bench import blas, report
from bench.model_shapes import SHAPES, random_mlx_lm_model, random_model
from bench.synthetic import Loop
from shared.config import Settings
from workers import cuda
from workers.build import make_engine, warm_up
from workers.calibrate import measure
from workers.machine import is_cpu
from workers.own_attention import may_serve_all

ARMS = ("tandem", "mlx-lm")


def run_tandem(options: argparse.Namespace) -> dict[str, Any]:
    cuda.prepare()  # as a server would
    if may_serve_all(SHAPES[options.shape]):
        cuda.leave_out_graphs()
    loaded = random_model(options.shape, options.dtype)
    settings = Settings(
        max_num_seqs=max(options.batches), max_model_len=options.prefill + 512, kv_layout=options.layout,
        max_num_batched_tokens=2048, attention=options.attention, draft_model="ngram",
    )  # fmt: skip
    engine, info = make_engine(loaded, settings)
    warm_up(engine, info)
    rates, firsts = {}, []
    for batch in options.batches:
        played = []
        for _ in range(options.repeats):
            played.append(Loop(engine, info).run(batch, options.output_tokens, options.prompt_tokens))
            engine.reset()
        rates[batch] = max(played)
    for _ in range(options.repeats):
        started = time.perf_counter()
        loop = Loop(engine, info)
        loop.run(1, 2, options.prefill)
        assert loop.first_token_at is not None
        firsts.append(loop.first_token_at - started)
        engine.reset()
    costs = {(c.batch, c.width): c.seconds for c in measure(engine, info)}
    return {
        "decode_tokens_per_s": rates, "prefill_s": min(firsts), "peak_gb": mx.get_peak_memory() / 1e9,
        "verify_over_step": {width: costs[1, width] / costs[1, 1] for b, width in costs if b == 1},
        "step_ms": {f"{batch}x{width}": round(1000 * s, 2) for (batch, width), s in costs.items()},
        "attention": list(info.attention),
    }  # fmt: skip


def run_mlx_lm(options: argparse.Namespace) -> dict[str, Any]:
    model = random_mlx_lm_model(options.shape, options.dtype)
    rates = {b: max(_decode(model, b, options) for _ in range(options.repeats)) for b in options.batches}
    firsts = [_prefill(model, options.prefill) for _ in range(options.repeats)]
    return {"decode_tokens_per_s": rates, "prefill_s": min(firsts), "peak_gb": mx.get_peak_memory() / 1e9}


def _decode(model: nn.Module, batch: int, options: argparse.Namespace) -> float:
    """Tokens per second from the step in which the last row began until the first one ends."""
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model, max_tokens=options.output_tokens, stop_tokens=[], completion_batch_size=batch, prefill_batch_size=batch
    )
    generator.insert([[7] * options.prompt_tokens for _ in range(batch)])
    tokens, started, ended = 0, 0.0, 0.0
    for _ in range(options.output_tokens + options.prompt_tokens):
        _, responses = generator.next()
        if ended:
            break
        if started:
            tokens += len(responses)
        elif len(responses) == batch:
            started = time.perf_counter()
        if any(r.finish_reason is not None for r in responses):
            ended = time.perf_counter()
    generator.close()
    return tokens / (ended - started)


def _prefill(model: nn.Module, length: int) -> float:
    """Seconds to the first token of a prompt."""
    from mlx_lm.generate import generate_step

    started = time.perf_counter()
    next(generate_step(mx.array([7] * length), model, max_tokens=1))
    return time.perf_counter() - started


def compared(shape: str, arms: dict[str, Any]) -> dict[str, Any]:
    """An entry of the result: both arms and the shares of mlx-lm's rates that ours reach."""
    entry: dict[str, Any] = {"shape": shape, **arms}
    if all(arm in arms and "error" not in arms[arm] for arm in ARMS):
        ours, theirs = arms["tandem"], arms["mlx-lm"]
        entry["decode_share"] = {
            b: ours["decode_tokens_per_s"][b] / rate for b, rate in theirs["decode_tokens_per_s"].items()
        }
        entry["prefill_share"] = theirs["prefill_s"] / ours["prefill_s"]
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    options.batches = [int(b) for b in options.batches.split(",")]
    if options.arm is not None:
        mx.random.seed(0)
        options.dtype = options.dtype or ("float32" if is_cpu() else "bfloat16")
        report.print_last_line({"tandem": run_tandem, "mlx-lm": run_mlx_lm}[options.arm](options))
        return 0
    entries = []
    for shape in options.shapes.split(","):
        entries.append(
            compared(shape, {arm: _child(shape, arm, options.limit, argv) for arm in options.arms.split(",")})
        )
        print(json.dumps(entries[-1]), file=sys.stderr, flush=True)
        if options.json:
            write(options.json, entries)
    report.print_last_line({"entries": entries})
    return 0


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    report.write_json(path, {**report.provenance("families"), "entries": entries})


def _child(shape: str, arm: str, limit_s: float, argv: Sequence[str] | None) -> dict[str, Any]:
    """What the arm measured, or why it did not."""
    command = [sys.executable, "-m", "bench.families", "--arm", arm, "--shape", shape, *(argv or sys.argv[1:])]
    try:
        environment = {**os.environ, **blas.environment(blas.find("auto"), None)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit_s:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3.5-4b,gemma4-e4b,gemma4-26b-a4b")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--dtype", help="bfloat16, on a CPU float32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--layout", choices=("auto", "slots", "paged"), default="auto")
    parser.add_argument("--attention", choices=("auto", "stock", "kernel"), default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts: shapes are compiled in the first")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for one arm")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
