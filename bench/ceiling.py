"""The raw ceiling: a closed loop through mlx-lm's own `BatchGenerator` in this process, without a server.

Same texts, chat template and lengths as `bench.serve` with the same options, so that its output tokens/s at the same
concurrency is the share of the ceiling that a server reaches: `python -m bench.ceiling --concurrency 1,8,32`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from bench import blas, peer_model, report
from bench.workloads import SEED_STRIDE, LocalCounter, Prompt, Shape, build, parse_range
from shared.config import load


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A model in this process. `model` and `tokenizer` are mlx-lm's."""

    model: Any
    tokenizer: Any
    folder: Path
    dtype: str
    device: str


class Ended(msgspec.Struct, kw_only=True):
    """One sequence; seconds after it was inserted."""

    inserted: float
    prompt_tokens: int
    first_s: float | None = None
    end_s: float | None = None
    output_tokens: int = 0
    finish_reason: str | None = None


def load_model(name: str, dtype: str) -> Loaded:
    """The model that the servers under comparison serve, in the dtype that is fast here.

    Args:
        dtype: "auto" is float32 without a GPU (only float32 goes through BLAS), else bfloat16.
    """
    import mlx.core as mx
    from mlx_lm.utils import load as load_folder

    folder = peer_model.folder_for(name, load())
    is_gpu = mx.default_device() == mx.Device(mx.gpu)
    chosen = ("bfloat16" if is_gpu else "float32") if dtype == "auto" else dtype
    model, tokenizer = load_folder(str(folder))
    model.set_dtype(getattr(mx, chosen))
    mx.eval(model.parameters())  # so that no cast is timed later
    return Loaded(model=model, tokenizer=tokenizer, folder=folder, dtype=chosen, device=str(mx.default_device()))


def encode(loaded: Loaded, prompts: Sequence[Prompt], *, is_chat: bool) -> list[list[int]]:
    """The token ids that a server would make of the prompts."""
    if not is_chat:
        return [loaded.tokenizer.encode(p.text, add_special_tokens=False) for p in prompts]
    return [
        loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": p.text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for p in prompts
    ]


def run(
    loaded: Loaded,
    token_ids: Sequence[list[int]],
    max_tokens: int,
    concurrency: int,
    *,
    ignore_eos: bool,
    on_end: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Plays a closed loop: when a sequence ends, the next one is inserted before the next step."""
    from mlx_lm.generate import BatchGenerator

    stop = [] if ignore_eos else [[t] for t in loaded.tokenizer.eos_token_ids]
    # Prefill as wide as a server would at this concurrency, but not wider than mlx-lm's own default.
    generator = BatchGenerator(
        loaded.model,
        max_tokens=max_tokens,
        stop_tokens=stop,
        completion_batch_size=concurrency,
        prefill_batch_size=min(8, concurrency),
    )
    waiting = iter(token_ids)
    live: dict[int, Ended] = {}
    ended: list[Ended] = []

    def insert() -> None:
        ids = next(waiting, None)
        if ids is not None:
            (uid,) = generator.insert([list(ids)])
            live[uid] = Ended(inserted=time.perf_counter(), prompt_tokens=len(ids))

    full_steps = 0
    full_s = 0.0
    is_prefilling = True
    start = time.perf_counter()
    for _ in range(concurrency):
        insert()
    # Each step gives a token or prefills a chunk, so the number of steps is bounded.
    for _ in range(len(token_ids) * (max_tokens + max(map(len, token_ids)))):
        if not live:
            break
        before = time.perf_counter()
        prompt_responses, responses = generator.next()
        now = time.perf_counter()
        if len(responses) == concurrency and not prompt_responses and not is_prefilling:
            full_steps += 1
            full_s += now - before
        # The step after a prefill waits for the prefill's queued work, so it is not counted either.
        is_prefilling = bool(prompt_responses)
        for response in responses:
            sequence = live[response.uid]
            sequence.output_tokens += 1
            if sequence.first_s is None:
                sequence.first_s = now - sequence.inserted
            if response.finish_reason is not None:
                sequence.finish_reason = response.finish_reason
                sequence.end_s = now - sequence.inserted
                ended.append(live.pop(response.uid))
                on_end()
                insert()
    wall_s = time.perf_counter() - start
    generator.close()
    assert not live, "BatchGenerator stopped giving tokens"
    output_tokens = sum(e.output_tokens for e in ended)
    tpots = [
        (e.end_s - e.first_s) / (e.output_tokens - 1)
        for e in ended
        if e.end_s is not None and e.first_s is not None and e.output_tokens > 1
    ]
    return {
        "concurrency": concurrency,
        "num_requests": len(ended),
        "wall_s": wall_s,
        "prompt_tokens": sum(e.prompt_tokens for e in ended),
        "output_tokens": output_tokens,
        "finish_reasons": {r: sum(e.finish_reason == r for e in ended) for r in {str(e.finish_reason) for e in ended}},
        "output_tokens_per_s": output_tokens / wall_s,
        "decode_tokens_per_s": full_steps * concurrency / full_s if full_steps else None,
        "num_full_decode_steps": full_steps,
        "ttft_s": report.spread([e.first_s for e in ended if e.first_s is not None]),
        "tpot_s": report.spread(tpots),
        "e2e_s": report.spread([e.end_s for e in ended if e.end_s is not None]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    library = blas.find(args.blas)
    blas.preload(library, args.blas_threads)
    loaded = load_model(args.model, args.dtype)
    import mlx.core as mx

    count = LocalCounter(str(loaded.folder))
    runs = []
    for concurrency in args.concurrency:
        num_requests = args.num_requests or args.requests_per_slot * concurrency
        shape = Shape(
            num_requests=num_requests,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
            shared_prefix=args.shared_prefix,
            mixed=args.mixed,
        )
        warm_shape = msgspec.structs.replace(shape, num_requests=concurrency, output_tokens=4)
        warm_up = encode(loaded, build(warm_shape, args.seed + SEED_STRIDE, count), is_chat=args.endpoint == "chat")
        run(loaded, warm_up, 4, concurrency, ignore_eos=True)
        for repeat in range(args.repeats):
            prompts = build(shape, args.seed + repeat * SEED_STRIDE * 2, count)
            token_ids = encode(loaded, prompts, is_chat=args.endpoint == "chat")
            with tqdm(total=num_requests, unit="req", desc=f"c={concurrency}", file=sys.stderr, disable=None) as bar:
                played = run(
                    loaded,
                    token_ids,
                    args.output_tokens,
                    concurrency,
                    ignore_eos=args.ignore_eos,
                    on_end=bar.update,
                )
                runs.append(played)
        mx.clear_cache()
    rows = [
        [
            str(r["concurrency"]),
            f"{r['output_tokens_per_s']:.1f}",
            "-" if r["decode_tokens_per_s"] is None else f"{r['decode_tokens_per_s']:.1f}",
            report.seconds(r["ttft_s"]["p50"]),
            report.seconds(r["tpot_s"]["p50"] if r["tpot_s"] else None),
            str(r["finish_reasons"]),
        ]
        for r in runs
    ]
    print(report.table(["concurrency", "output tok/s", "decode tok/s", "TTFT p50", "TPOT p50", "finish"], rows))
    result = report.provenance("ceiling") | {
        "model": loaded.folder.name,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "blas": library.name if library else None,
        "blas_threads": args.blas_threads,
        "peak_memory_bytes": mx.get_peak_memory(),
        "options": {k: v for k, v in vars(args).items() if k != "json"},
        "runs": runs,
    }
    report.finish(result, args.json)
    return 0


def concurrencies(text: str) -> list[int]:
    """ "1,8" -> [1, 8]. Raises ValueError: not a list of positive numbers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(f"{text!r} holds a number below 1")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ceiling", description=__doc__)
    add = parser.add_argument
    add("--model", default="default", help="as TANDEM_MODEL; a GGUF is converted once")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--concurrency", type=concurrencies, default=[1, 8], help="as 1,8,32")
    add("--num-requests", type=int, default=0, help="of each concurrency; 0: --requests-per-slot of each")
    add("--requests-per-slot", type=int, default=4)
    add("--prompt-tokens", type=int, default=64)
    add("--output-tokens", type=int, default=128)
    add("--shared-prefix", type=int, default=0)
    add("--mixed", type=parse_range)
    add("--endpoint", choices=["chat", "completions"], default="chat")
    add("--seed", type=int, default=0)
    add("--ignore-eos", action="store_true")
    add("--repeats", type=int, default=1)
    add("--blas", default="auto", help='Linux without a GPU: "auto", "off" or a library')
    add("--blas-threads", type=int, help="default: the library's own choice")
    add("--json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
