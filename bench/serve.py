"""Load over HTTP against any OpenAI-compatible server: `python -m bench.serve --url URL --concurrency 8 ...`.

With `--start MODEL` against a server of our own, which takes its settings from the environment and ends with the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from bench import report
from bench.load import Played, Record, Target, play, summarize
from bench.peers import ARMS, serving
from bench.workloads import SEED_STRIDE, Prompt, Shape, build, choose_counter, parse_range


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when any request failed."""
    args = _parser().parse_args(argv)
    if not args.start:
        return run(args, args.url.rstrip("/").removesuffix("/v1"))
    with tempfile.TemporaryFile() as log, serving(ARMS[0], Path(sys.executable), args.start, {}, log) as started:
        return run(args, started.url)


def run(args: argparse.Namespace, url: str) -> int:
    target = Target(
        url=url,
        model=args.model,
        endpoint=args.endpoint,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        api_key=args.api_key,
        extra_body=args.extra_body,
        timeout_s=args.timeout,
    )
    shape = Shape(
        num_requests=args.num_requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        shared_prefix=args.shared_prefix,
        mixed=args.mixed,
        request_rate=args.request_rate,
    )
    concurrency = None if args.request_rate else args.concurrency
    warm_shape = msgspec.structs.replace(shape, num_requests=args.warmup, output_tokens=min(8, args.output_tokens))
    count, close = choose_counter(target.url, target.model, args.tokenizer, target.headers)
    try:
        # Another seed, so that the warm-up leaves no prompt of the load in a prefix cache.
        warm_up = build(msgspec.structs.replace(warm_shape, request_rate=None), args.seed + SEED_STRIDE, count)
        loads = [build(shape, args.seed + repeat * SEED_STRIDE * 2, count) for repeat in range(args.repeats)]
    finally:
        close()
    warm = asyncio.run(play(target, warm_up, args.concurrency))
    if warm.records and all(record.error for record in warm.records):
        print(f"every warm-up request failed: {warm.records[0].status} {warm.records[0].error}", file=sys.stderr)
        return 1
    runs = []
    summaries = []
    for prompts in loads:
        played = asyncio.run(_with_bar(target, prompts, args.concurrency))
        summary = summarize(played, concurrency)
        runs.append(played)
        summaries.append(summary)
        print_summary(summary)
    result = report.provenance("serve") | {
        "target": {"url": target.url, "model": target.model, "endpoint": target.endpoint},
        "workload": msgspec.to_builtins(shape) | {"seed": args.seed, "token_counter": count.source},
        "runs": summaries,
        "output_tokens_per_s": report.spread([s["output_tokens_per_s"] for s in summaries if s["output_tokens_per_s"]]),
    }
    if args.json:
        report.write_json(args.json, result | {"records": [msgspec.to_builtins(run.records) for run in runs]})
    report.print_last_line(result)
    return 1 if any(s["num_errors"] for s in summaries) else 0


async def _with_bar(target: Target, prompts: Sequence[Prompt], concurrency: int) -> Played:
    with tqdm(total=len(prompts), unit="req", file=sys.stderr, disable=None) as bar:

        def on_end(record: Record) -> None:
            bar.update(1)

        return await play(target, prompts, concurrency, on_end)


def print_summary(summary: dict[str, Any]) -> None:
    """The small table of one load, on standard output."""
    names = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "end-to-end"}
    rows = [
        [name, *(report.seconds(summary[key][f"p{p}"] if summary[key] else None) for p in report.PERCENTILES)]
        for key, name in names.items()
    ]
    print(report.table(["", *(f"p{p}" for p in report.PERCENTILES)], rows))
    if summary["output_tokens_per_s"] is None:
        print(f"no token rates: {summary['num_without_usage']} streams came without usage")
    else:
        print(
            f"output {summary['output_tokens_per_s']:.1f} tokens/s, total {summary['total_tokens_per_s']:.1f}, "
            f"{summary['output_tokens']} output tokens in {summary['wall_s']:.1f} s, "
            f"prompt tokens {summary['prompt_tokens']} (cached {summary['cached_tokens']})"
        )
    print(f"requests {summary['num_requests']}, errors {summary['num_errors']}, finish {summary['finish_reasons']}")
    for text, number in summary["errors"].items():
        print(f"  {number} x {text}")


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080")
    add("--start", type=Path, metavar="MODEL", help="start a server of this folder or file, and use it")
    add("--model", default="default", help="the model name to send")
    add("--endpoint", choices=["chat", "completions"], default="chat")
    add("--concurrency", type=_positive, default=8, help="clients of the closed loop")
    add("--request-rate", type=float, help="open loop: Poisson arrivals per second, instead of --concurrency")
    add("--num-requests", type=_positive, default=64)
    add("--prompt-tokens", type=_positive, default=64, help="tokens of each prompt's own text")
    add("--output-tokens", type=_positive, default=128)
    add("--shared-prefix", type=int, default=0, help="tokens that all prompts start with")
    add("--mixed", type=parse_range, help="own prompt lengths uniform in this range, as 24-600")
    add("--seed", type=int, default=0)
    add("--temperature", type=float, default=0.0)
    add("--ignore-eos", action="store_true", help="send ignore_eos; servers without that field may refuse")
    add("--extra-body", type=_json_object, default={}, help="JSON object merged into every request")
    add("--api-key")
    add("--tokenizer", help="folder with tokenizer.json to measure prompts with; default: /tokenize, else estimate")
    add("--warmup", type=int, default=2, help="requests before the load")
    add("--repeats", type=_positive, default=1, help="loads, each with its own seed")
    add("--timeout", type=float, default=600.0, help="seconds for one request")
    add("--json", help="file for the whole result, records included")
    return parser


if __name__ == "__main__":
    sys.exit(main())
