"""The prompts of the drafter benchmark, made for this project: bench/prompts/*.jsonl, one `{"id", "prompt"}` on a line.

What drafts gain depends on the text, so there is a set for each kind of work: talk, code that is given back with a
change, texts to shorten, JSON that is copied, sums. All are sized for a small model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.workloads import Prompt

FOLDER = Path(__file__).resolve().parent / "prompts"
WORKLOADS = ("chat", "code-edit", "summarise", "repeat-json", "math")


def read(workload: str) -> list[str]:
    """The texts of one set, in order."""
    lines = (FOLDER / f"{workload}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def pick(texts: Sequence[str], number: int, output_tokens: int, tenant: str, first: int = 0) -> list[Prompt]:
    """`number` requests from the set, starting at `first` and beginning again at its end.

    Args:
        tenant: a name that no other load uses. Nothing of an earlier load can be found by its requests then: neither a
            cached prefix, nor an output of the same prompt, which n-gram drafts would copy. (Servers that do not know
            the header have whatever their caches hold.)
    """
    prompts = []
    for i in range(number):
        at, lap = (first + i) % len(texts), (first + i) // len(texts)
        headers = {"X-Cache-Tenant": f"{tenant}/{lap}"}
        words = len(texts[at].split())
        prompts.append(Prompt(index=i, text=texts[at], num_tokens=words, max_tokens=output_tokens, headers=headers))
    return prompts
