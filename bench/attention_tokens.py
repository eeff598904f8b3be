"""Greedy tokens of every attention path on a model of a real shape, over the same text, with ties counted.

    python -m bench.attention_tokens --shape 8b --batch 8 --steps 200 --json result.json

Stock operations in slots write a text for each row; every arm reads it token by token and says what it would have put
out at each position. A position that differs is a tie where the two best log-probabilities of the text lie no farther
apart than `--tie-bound`. By default that is what stock operations themselves need: where they read the text several
tokens a row, products of other shapes round otherwise. Exit code 1: a difference that is no tie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench import report
from bench.model_shapes import SHAPES, random_model
from shared.config import Settings
from shared.messages import RequestId, RowResult, SamplingParams, SequenceStart, Step, StepRow
from workers import cuda
from workers.build import make_engine
from workers.engine import Engine
from workers.load import LoadedModel
from workers.machine import is_cpu
from workers.own_attention import may_serve_all

ARMS = ("slots/kernel", "paged/stock", "paged/kernel")
VERIFIED = 4  # tokens a row of the second reading

Position = tuple[int, float]
"""(greedy token, distance of the two best log-probabilities)"""


def positions_of(engine: Engine, text: list[list[int]], prompt: int, width: int) -> list[list[Position]]:
    """What the engine puts out behind each of `text`'s tokens from `prompt` on, `width` of them a step."""
    prefill(engine, text, prompt)
    found: list[list[Position]] = [[] for _ in text]
    for at in range(prompt, len(text[0]), width):
        rows = [row_of(slot, at, tokens[at : at + width]) for slot, tokens in enumerate(text)]
        for result in engine.finish(engine.begin(step_of(decodes=rows))).rows:
            found[result.slot] += read(result)
    engine.reset()
    return found


def write_text(engine: Engine, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[list[Position]]]:
    """Greedy decoding: (each row's prompt and tokens, what was put out at each position behind the prompt's end)."""
    text = [list(prompt) for prompt in prompts]
    found: list[list[Position]] = [[] for _ in text]
    for result in prefill(engine, text, len(prompts[0])):
        text[result.slot].append(result.token_ids[0])
    for _ in range(steps):
        rows = [row_of(slot, len(tokens) - 1, tokens[-1:]) for slot, tokens in enumerate(text)]
        for result in engine.finish(engine.begin(step_of(decodes=rows))).rows:
            text[result.slot].append(result.token_ids[0])
            found[result.slot] += read(result)
    engine.reset()
    return [tokens[:-1] for tokens in text], found


def prefill(engine: Engine, text: list[list[int]], length: int) -> list[RowResult]:
    greedy = SamplingParams(temperature=0.0, num_logprobs=2)
    starts = [
        SequenceStart(slot=slot, request_id=RequestId(f"r{slot}"), sampling=greedy, num_prompt_tokens=length,
                      token_ids=tokens[:length])
        for slot, tokens in enumerate(text)
    ]  # fmt: skip
    rows = [row_of(slot, 0, tokens[:length]) for slot, tokens in enumerate(text)]
    return engine.finish(engine.begin(step_of(starts=starts, prefills=rows))).rows


def row_of(slot: int, start: int, tokens: list[int]) -> StepRow:
    num_drafts = len(tokens) - 1 if start else 0
    return StepRow(slot=slot, start=start, capacity=start + len(tokens) + 32, token_ids=tokens, num_drafts=num_drafts)


def step_of(**rows: Any) -> Step:  # noqa: ANN401 - lists of rows
    return Step(**{"epoch": 0, "step_id": 0, "starts": [], "decodes": [], "prefills": [], **rows})


def read(result: RowResult) -> list[Position]:
    assert result.logprobs is not None, "asked for"
    return [
        (token, chances.top[0].logprob - chances.top[1].logprob)
        for token, chances in zip(result.token_ids, result.logprobs, strict=True)
    ]


def compared(wanted: list[list[Position]], found: list[list[Position]], tie_bound: float) -> dict[str, Any]:
    gaps = [
        gap
        for theirs, ours in zip(wanted, found, strict=True)
        for (token, gap), (other, _) in zip(theirs, ours, strict=True)
        if token != other
    ]
    return {
        "positions": sum(map(len, wanted)), "differ": len(gaps), "ties": sum(gap <= tie_bound for gap in gaps),
        "largest_gap_of_a_difference": max(gaps, default=0.0),
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    mx.random.seed(0)
    loaded = random_model(options.shape, options.dtype or ("float32" if is_cpu() else "bfloat16"))
    vocab = loaded.vocab_size
    prompts = [[(31 * slot + 7 * i * i) % vocab for i in range(options.prompt)] for slot in range(options.batch)]
    text, wanted = write_text(engine_of(loaded, "slots", "stock", options), prompts, options.steps)
    control = positions_of(engine_of(loaded, "slots", "stock", options), text, options.prompt, VERIFIED)
    noise = compared(wanted, control, float("inf"))
    bound = noise["largest_gap_of_a_difference"] if options.tie_bound is None else options.tie_bound
    arms: dict[str, Any] = {}
    for arm in options.arms.split(","):
        layout, _, attention = arm.partition("/")
        for width in (1, VERIFIED):
            found = positions_of(engine_of(loaded, layout, attention, options), text, options.prompt, width)
            name = f"{arm}, {width} a row"
            arms[name] = compared(wanted, found, bound)
            print(name, arms[name], file=sys.stderr, flush=True)
    return {
        "tie_bound": bound,
        "stock_against_itself": noise,
        "batch": options.batch,
        "steps": options.steps,
        "arms": arms,
    }


def engine_of(loaded: LoadedModel, layout: str, attention: str, options: argparse.Namespace) -> Engine:
    chosen: dict[str, Any] = {"kv_layout": layout, "attention": attention}
    settings = Settings(
        max_num_seqs=options.batch, max_model_len=max(512, options.prompt + options.steps + 64),
        max_num_batched_tokens=2048, draft_model="ngram", prefix_cache=False, **chosen,
    )  # fmt: skip
    engine, _ = make_engine(loaded, settings)
    engine.count_accepted = lambda drafts, _tokens: len(drafts)  # the text is given
    return engine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--dtype", help="bfloat16, on a CPU float32")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tie-bound", type=float, help="nats; by default what stock operations need")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    cuda.prepare()
    if may_serve_all(SHAPES[options.shape]):
        cuda.leave_out_graphs()
    result = {**report.provenance("attention_tokens"), "shape": options.shape, **run(options)}
    report.finish(result, options.json)
    return int(any(arm["differ"] > arm["ties"] for arm in result["arms"].values()))


if __name__ == "__main__":
    sys.exit(main())
