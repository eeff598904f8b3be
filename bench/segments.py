"""What the frontend's memory of a conversation's parts saves: tokenizing each turn whole, and part by part.

`python -m bench.segments --json result.json`
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench import report
from bench.workloads import fit
from frontend import tokenizer
from frontend.segments import SegmentTokens
from shared import model_files
from shared.config import load

REPEATS = 5


class Counter:
    """`TokenCounter` by the model's own tokenizer."""

    source = "model"

    def __init__(self, known: Tokenizer) -> None:
        self._known = known

    def __call__(self, text: str) -> int:
        return len(tokenizer.encode(self._known, text, add_special_tokens=False))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="with ChatML's special tokens")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--system-tokens", type=int, default=6000)
    parser.add_argument("--turn-tokens", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    known = tokenizer.load(model_files.resolve(options.model, load())).tokenizer

    def whole(text: str) -> list[int]:
        return tokenizer.encode(known, text, add_special_tokens=False)

    rng, count = random.Random(1), Counter(known)
    remembered = [SegmentTokens(known) for _ in range(REPEATS)]  # each sees every turn once
    text = "<|im_start|>system\n" + fit(rng, options.system_tokens, count) + "<|im_end|>\n"
    rows: list[dict[str, Any]] = []
    for turn in range(options.turns):
        said = fit(rng, options.turn_tokens // 2, count)
        text += f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n{said[::-1]}<|im_end|>\n"
        tokens = whole(text)
        whole_s = min(_seconds(partial(whole, text)) for _ in range(REPEATS))
        parts_s = min(_seconds(partial(segments.encode, text, "")) for segments in remembered)
        assert remembered[0].encode(text, "") == tokens, "the same tokens"
        rows.append({"turn": turn, "tokens": len(tokens), "whole_ms": 1000 * whole_s, "parts_ms": 1000 * parts_s})
    shown = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(report.table(list(rows[0]), shown))
    result = {**report.provenance("segments"), "turns": rows}
    if options.json:
        report.write_json(options.json, result)
    report.print_last_line({"benchmark": "segments", "last": rows[-1]})
    return 0


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
