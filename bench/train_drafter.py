"""Trains a drafter for a target from the target's own generations.

    python -m bench.train_drafter generate --out documents.npz --seconds 200
    python -m bench.train_drafter train --data documents.npz --kind dflash --layers 4 --seconds 240 --out folder
    python -m bench.train_drafter evaluate --data documents.npz --drafter folder

`train` writes a folder that `TANDEM_DRAFT_MODEL` takes, with its curve (curve.json, curve.png) and a card. It goes on
from `--checkpoint` where that file exists. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import blas, report

KINDS = ("dflash", "eagle3", "mtp")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    stages = top.add_subparsers(dest="stage", required=True)

    made = stages.add_parser("generate", help="documents: prompts and answers of the target")
    made.add_argument("--out", type=Path, required=True, help="documents file; added to where it exists")
    made.add_argument("--seconds", type=float, default=200.0)
    made.add_argument("--slots", type=int, default=2048)
    made.add_argument("--capacity", type=int, default=576, help="positions of a slot")
    made.add_argument("--max-answer", type=int, default=448)
    made.add_argument("--steps-per-read", type=int, default=32)
    made.add_argument("--held-out-share", type=float, default=0.015)

    train = stages.add_parser("train", help="one drafter")
    train.add_argument("--data", type=Path, nargs="+", required=True)
    train.add_argument("--kind", choices=KINDS, required=True)
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--checkpoint", type=Path, help="state to go on from and to leave behind")
    train.add_argument("--seconds", type=float, help="length of the whole run")
    train.add_argument("--steps", type=int, help="length of the whole run, in place of seconds")
    train.add_argument("--visit-seconds", type=float, help="end this process earlier; the checkpoint goes on")
    train.add_argument("--layers", type=int, default=4, help="dflash")
    train.add_argument("--block-size", type=int, default=8, help="dflash")
    train.add_argument("--mask-token", type=int, default=16, help="dflash: an unused token")
    train.add_argument("--bidirectional", action="store_true", help="dflash: a block's rows see each other")
    train.add_argument("--unroll", type=int, help="eagle3, mtp: steps on its own outputs (4, 3)")
    train.add_argument("--inner-size", type=int, help="width of the feed-forward parts; the target's without it")
    train.add_argument("--taps", type=parse_taps, help="blocks after which features are taken, as 1,8,14")
    train.add_argument("--no-tap-scale", action="store_true", help="do not divide taps by their channels' size")
    train.add_argument("--init", choices=("random", "target"), default="random")
    train.add_argument("--from-drafter", type=Path, help="begin with the weights of an exported folder")
    train.add_argument("--norm-scale", type=float, default=0.2, help="of the final norm at first, of the target's")
    train.add_argument("--tokens-per-step", type=int, default=16384)
    train.add_argument("--anchors-per-token", type=float, help="0.125 for dflash, 0.25 for the others")
    train.add_argument("--max-length", type=int, default=576)
    train.add_argument("--optimiser", choices=("muon", "adamw"), default="muon")
    train.add_argument("--rate", type=float, help="peak for matrices: 5e-3 with Muon, 1e-3 with AdamW")
    train.add_argument("--norm-rate", type=float, default=1e-3)
    train.add_argument("--cross-entropy", type=float, default=0.1)
    train.add_argument("--teacher-temperature", type=float, default=1.0)
    train.add_argument("--pace-floor", type=float, default=0.5)
    train.add_argument("--logit-rows", type=int, default=4096)
    train.add_argument("--evaluate-every", type=float, default=30.0)
    train.add_argument("--evaluate-documents", type=int, default=64)
    train.add_argument("--final-documents", type=int, default=200)
    train.add_argument("--draft-tokens", type=int, default=0, help="in the reported acceptance; 0: all predicted")
    train.add_argument(
        "--cache-gb", type=float, default=16.0, help="freed memory that is kept: others may train beside"
    )
    train.add_argument("--compile", action="store_true", help="the whole step; on CUDA the first one takes minutes")

    judged = stages.add_parser("evaluate", help="acceptance of an exported drafter on held-out documents")
    judged.add_argument("--data", type=Path, nargs="+", required=True)
    judged.add_argument("--drafter", type=Path, required=True)
    judged.add_argument("--documents", type=int, default=200)
    judged.add_argument("--draft-tokens", type=int, default=0)

    for stage in (made, train, judged):
        stage.add_argument("--target", help="the model; TANDEM_MODEL or the embedded one without it")
        stage.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--quiet", action="store_true", help="no progress bar")
    return top


def parse_taps(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if "mlx.core" not in sys.modules:
        blas.preload(blas.find("auto"), None)
    stage = {"generate": generate, "train": train, "evaluate": evaluate}[args.stage]
    report.print_last_line(stage(args))
    return 0


def generate(args: argparse.Namespace) -> dict[str, Any]:
    from bench.training.documents import Documents
    from bench.training.generate import GenerateOptions, Generator
    from bench.training.prompts import build
    from bench.training.target import load_target
    from shared.config import load
    from shared.model_files import resolve

    target = load_target(args.target or load().model, dtype=args.dtype)
    openings = build(resolve(args.target or load().model, load()))
    parts = [Documents.load(args.out)] if args.out.exists() else []
    # What is there already was made with this seed: go on with other random numbers.
    seed = args.seed + 1_000_003 * (len(parts[0]) if parts else 0)
    options = GenerateOptions(
        num_slots=args.slots, capacity=args.capacity, max_answer=args.max_answer, steps_per_read=args.steps_per_read,
        held_out_share=args.held_out_share, seed=seed,
    )  # fmt: skip
    generator = Generator(target, openings, options)
    began = time.monotonic()
    timed: list[tuple[float, int]] = []
    with tqdm(total=round(args.seconds), unit="s", disable=args.quiet, mininterval=5) as bar:
        for documents in generator.run(seconds=args.seconds):
            parts.append(documents)
            elapsed = time.monotonic() - began
            timed.append((elapsed, generator.num_slot_tokens))
            bar.update(min(round(args.seconds), int(elapsed)) - int(bar.n))
            bar.set_postfix(documents=generator.num_documents, looped=generator.num_looped, refresh=False)
    elapsed = time.monotonic() - began
    whole = Documents.join(parts)
    whole.save(args.out)
    first, last = timed[min(1, len(timed) - 1)], timed[-1]  # kernels are loaded in the first chunk
    speed = (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0
    trained = (whole.split == 0) & ~whole.looped
    return {
        "stage": "generate", "slots": args.slots, "seconds": elapsed, "slot_tokens_per_s": speed,
        "ms_per_step": 1000 * args.slots / speed if speed else None,
        "answer_tokens_per_s": generator.num_answer_tokens / elapsed, "documents": len(whole),
        "looped": generator.num_looped, "finished": generator.num_documents, "bad_prompts": generator.num_bad_prompts,
        "training_documents": int(trained.sum()),
        "training_answer_tokens": int((whole.lengths - whole.prompts)[trained].sum()),
        "held_out_documents": int((whole.split == 1).sum()), "peak_gb": peak_gb(),
    }  # fmt: skip


def train(args: argparse.Namespace) -> dict[str, Any]:
    import mlx.core as mx

    from bench.training import build
    from bench.training.documents import Batches, Documents
    from bench.training.export import card, export
    from bench.training.losses import LossOptions
    from bench.training.optimiser import Optimiser
    from bench.training.plot import plot
    from bench.training.run import Run, RunOptions, tap_scale
    from bench.training.target import load_target
    from shared.config import load

    mx.set_cache_limit(int(args.cache_gb * 1e9))
    target = load_target(args.target or load().model, dtype=args.dtype)
    drafter = build.drafter(build.Choice.of(args), target)
    target.tap(drafter.taps)
    documents = Documents.join([Documents.load(path) for path in args.data])
    density = args.anchors_per_token or (0.125 if args.kind == "dflash" else 0.25)
    batches = Batches(documents, args.tokens_per_step, density, drafter.num_predictions, args.seed, args.max_length)
    if drafter.taps and not args.no_tap_scale:
        drafter.tap_scale = tap_scale(target, drafter.taps, batches)
    params = drafter.initialise(args.seed, target, norm_scale=args.norm_scale)
    if args.init == "target":
        if args.inner_size is not None:
            raise SystemExit("--init target: the target's layers have feed-forward parts of their own width")
        params = drafter.warm_start(params, target)
    if args.from_drafter is not None:
        params = build.read(args.from_drafter, drafter, params)
    is_muon = args.optimiser == "muon"
    optimiser = Optimiser(
        matrix_rate=args.rate or (5e-3 if is_muon else 1e-3),
        norm_rate=args.norm_rate if is_muon else args.rate or 1e-3, is_muon=is_muon,
    )  # fmt: skip
    run = Run(
        drafter, target, documents, batches, optimiser,
        LossOptions(args.cross_entropy, args.teacher_temperature, args.pace_floor, args.logit_rows),
        RunOptions(
            seconds=args.seconds, steps=args.steps, visit_seconds=args.visit_seconds,
            evaluate_every=args.evaluate_every, evaluate_documents=args.evaluate_documents,
            final_documents=args.final_documents, num_draft_tokens=args.draft_tokens,
            is_compiled=args.compile, is_quiet=args.quiet,
        ),
        params, target.dtype,
    )  # fmt: skip
    if args.checkpoint is not None and args.checkpoint.exists():
        run.resume(args.checkpoint)
    first = run.number
    began = time.monotonic()
    run.train(args.checkpoint)
    training_s = time.monotonic() - began
    run.validate()
    results = run.measure(args.final_documents)
    facts = {
        "target": target.name,
        "kind": args.kind,
        "parameters": f"{sum(p.size for p in params.values()) / 1e6:.2f} million",
        "data": f"{len(documents)} documents of the target, {documents.num_answer_tokens / 1e6:.1f} million answer "
        f"tokens; {run.num_answer_tokens / 1e6:.1f} million seen in training",
        "steps": run.number,
        "seconds of training": round(run.elapsed_s),
        "machine": report.gpu() or report.machine()["cpu"],
        "seed": args.seed,
        "commit": report.provenance("train_drafter")["commit"],
        "options": " ".join(sys.argv[1:]),
    }
    export(args.out, drafter, run.params, card(f"{args.kind} drafter for {target.name}", facts, results))
    curve = {"facts": facts, "results": results, "curve": run.curve, "losses": run.losses}
    report.write_json(args.out / "curve.json", curve)
    plot(args.out / "curve.png", f"{args.kind} for {target.name}", run.curve)
    steps = run.number - first
    return {
        "stage": "train", "kind": args.kind, "steps": steps, "ms_per_step": 1000 * training_s / max(1, steps),
        "steps_per_epoch": batches.steps_per_epoch, "answer_tokens": run.num_answer_tokens,
        "loss": float(np.mean(run.losses[-20:])) if run.losses else None,
        "first_losses": [round(loss, 3) for loss in run.losses[:3]],
        "peak_gb": peak_gb(), "results": results, "device": str(mx.default_device()),
    }  # fmt: skip


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from bench.training import build
    from bench.training import evaluate as judge
    from bench.training.documents import Documents
    from bench.training.target import load_target
    from shared.config import load

    target = load_target(args.target or load().model, dtype=args.dtype)
    drafter = build.of_folder(args.drafter, target)
    target.tap(drafter.taps)
    params = build.read(args.drafter, drafter)
    documents = Documents.join([Documents.load(path) for path in args.data])
    k = drafter.num_predictions
    draft = judge.drafting(drafter, params, target, target.dtype)
    results = judge.measure(draft, documents, k, args.draft_tokens or k, args.documents)
    return {"stage": "evaluate", "drafter": str(args.drafter), "results": results}


def peak_gb() -> float:
    import mlx.core as mx

    return mx.get_peak_memory() / 1e9


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
