"""What packing rows of different widths into one batch row saves in a step of the engine: `python -m bench.packed`.

The embedded model (or `--model`), no server: 8 sequences of 100 tokens each, whose rows hold so many drafts, and in
some steps a chunk of another sequence's prompt. Each step is run padded (rows of one width, the prompt in a forward of
its own) and packed in turn; the best of `--repeats` counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import blas, report

STEPS: tuple[tuple[str, tuple[int, ...], int], ...] = (  # what, drafts of each decode row, tokens of a prompt's chunk
    ("2 with 7 drafts, 6 without", (7, 7, 0, 0, 0, 0, 0, 0), 0),
    ("2 with 3 drafts, 6 without", (3, 3, 0, 0, 0, 0, 0, 0), 0),
    ("8 decode rows and 64 prompt tokens", (0,) * 8, 64),
    ("8 decode rows and 128 prompt tokens", (0,) * 8, 128),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    blas.preload(blas.find(options.blas), options.blas_threads)
    from bench.engine_steps import CONTEXT

    rows = measure(options.model, options.repeats)
    print(report.table(["rows of the step", "padded, prefill apart", "packed"],
                       [[r["rows"], f"{r['padded_ms']:.0f}", f"{r['packed_ms']:.0f}"] for r in rows]))  # fmt: skip
    result = {**report.provenance("packed"), "context": CONTEXT, "repeats": options.repeats, "steps": rows}
    report.finish(result, options.json)
    return 0


def measure(model: str | None, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each of `STEPS`, both ways.

    Raises:
        BadModel: the model cannot be loaded, or its rows are never packed here.
    """
    from bench.engine_steps import CAPACITY, step_seconds
    from shared.config import Settings, load
    from shared.errors import BadModel
    from shared.model_files import resolve
    from workers.build import load_target, make_engine, warm_up

    settings = Settings(max_num_seqs=16, max_model_len=CAPACITY, prefix_cache=False)
    loaded = load_target(resolve(model or load().model, load()), settings)
    engine, info = make_engine(loaded, settings)
    if not engine.packs_rows:
        raise BadModel(f"rows of {loaded.name} are not packed on this machine")
    warm_up(engine, info)
    found = []
    for name, drafts, num_prompt in STEPS:
        best = {True: float("inf"), False: float("inf")}
        for _ in range(repeats + 1):  # the first pair grows buffers
            for is_packed in best:
                engine.packs_rows = is_packed
                best[is_packed] = min(best[is_packed], step_seconds(engine, drafts, num_prompt))
        found.append({"rows": name, "padded_ms": 1000 * best[False], "packed_ms": 1000 * best[True]})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as TANDEM_MODEL")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--blas", default="auto", help='Linux without a GPU: "auto", "off" or a library')
    parser.add_argument("--blas-threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
