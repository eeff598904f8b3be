"""`tandem race`: the same greedy prompts through the real processes without and with a drafter, side by side.

Each arm is a server of its own on a free port, started and stopped here; prompts are played one after another, since
a drafter helps most when the machine is not full, and so that texts do not depend on how requests meet in a batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from msgspec import Struct, to_builtins
from tqdm import tqdm

from shared.errors import BadConfig, Unavailable
from tandem.draft_counters import DraftCounters, parse, total
from tandem.own_server import own_server
from tandem.race_prompts import PROMPTS


class Answer(Struct, frozen=True):
    text: str
    num_tokens: int
    seconds: float  # from the first token to the last, as the server measured it


class Arm(Struct, frozen=True):
    """What one server gave."""

    drafter: str
    answers: list[Answer]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_at: list[float]  # share of drafts whose token at this position was accepted

    @property
    def tokens_per_s(self) -> float:
        """Decode tokens; the first token of each answer belongs to its prefill."""
        seconds = sum(a.seconds for a in self.answers)
        return sum(a.num_tokens - 1 for a in self.answers) / seconds if seconds > 0 else 0.0


def read_prompts(path: str | None) -> list[str]:
    """One prompt on each line, or our own.

    Raises:
        BadConfig: the file cannot be read or holds none.
    """
    if path is None:
        return list(PROMPTS)
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"--prompts {path}: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise BadConfig(f"--prompts {path} holds no prompt")
    return prompts


def race(draft_model: str, model: str, prompts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    """Play both arms.

    Raises:
        Unavailable: a server did not become ready, or ended.
    """
    drafters = ("none", draft_model)
    with tqdm(total=len(drafters) * len(prompts), unit="prompt", file=sys.stderr, disable=None, leave=False) as bar:
        arms = [play(model, drafter, prompts, max_tokens, bar) for drafter in drafters]
    plain, drafted = arms
    pairs = list(zip(plain.answers, drafted.answers, strict=True))
    return {
        "model": model,
        "draft_model": draft_model,
        "num_prompts": len(prompts),
        "num_equal_texts": sum(a.text == b.text for a, b in pairs),
        "first_differences": [_first_difference(a.text, b.text) for a, b in pairs],
        "speed_up": drafted.tokens_per_s / plain.tokens_per_s if plain.tokens_per_s else 0.0,
        "arms": [{**to_builtins(arm), "tokens_per_s": arm.tokens_per_s} for arm in arms],
    }


def play(model: str, drafter: str, prompts: Sequence[str], max_tokens: int, bar: tqdm[Any]) -> Arm:
    """All prompts through a server with this drafter, after one that warms it up."""
    name = "plain" if drafter == "none" else Path(drafter).name
    bar.set_description(f"{name}: starting")
    answers = []
    with own_server({"MODEL": model, "DRAFT_MODEL": drafter}) as client:
        _ask(client, prompts[0], max_tokens)
        before = _counters(client)
        bar.set_description(name)
        for prompt in prompts:
            answers.append(_ask(client, prompt, max_tokens))
            bar.update(1)
        counts = _counters(client).since(before)
    return Arm(
        drafter=drafter,
        answers=answers,
        num_drafts=int(counts.num_drafts),
        num_draft_tokens=int(counts.num_draft_tokens),
        num_accepted_tokens=int(counts.num_accepted_tokens),
        accepted_at=counts.acceptance_by_position,
    )


def _ask(client: httpx.Client, prompt: str, max_tokens: int) -> Answer:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        raise Unavailable(f"the server answered {answer.status_code}: {answer.text[:500]}")
    content = answer.json()
    message = content["choices"][0]["message"]
    text = (message.get("reasoning_content") or "") + (message.get("content") or "")
    return Answer(text, content["usage"]["completion_tokens"], content["timings"]["predicted_ms"] / 1e3)


def _counters(client: httpx.Client) -> DraftCounters:
    """Of all drafters together."""
    return total(parse(client.get("/metrics").text))


def _first_difference(a: str, b: str) -> int | None:
    """Index of the first character that differs; None for equal texts."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def report(result: dict[str, Any]) -> str:
    """The race as lines for a person."""
    lines = [f"{result['model']}, {result['num_prompts']} greedy prompts, one at a time", ""]
    lines.append(f"{'drafter':<32}{'tokens/s':>10}{'drafted':>10}{'accepted':>10}  accepted by position")
    for arm in result["arms"]:
        share = arm["num_accepted_tokens"] / arm["num_draft_tokens"] if arm["num_draft_tokens"] else 0.0
        positions = " ".join(f"{chance:.2f}" for chance in arm["accepted_at"])
        name = Path(arm["drafter"]).name[:31]
        lines.append(f"{name:<32}{arm['tokens_per_s']:>10.1f}{arm['num_draft_tokens']:>10}{share:>10.2f}  {positions}")
    lines += ["", f"speed-up {result['speed_up']:.2f}"]
    lines.append(f"equal texts: {result['num_equal_texts']} of {result['num_prompts']}")
    for i, at in enumerate(result["first_differences"]):
        if at is not None:
            lines.append(f"  prompt {i + 1} differs from character {at} on (see `exactness` in /health)")
    return "\n".join(lines)


def main(options: dict[str, Any]) -> int:
    """The command; exit code 0 whatever the texts, which the report compares."""
    max_tokens = options["max_tokens"]
    if max_tokens < 2:
        raise BadConfig("--max-tokens must be at least 2")
    result = race(options["draft_model"], options["model"], read_prompts(options["prompts"]), max_tokens)
    print(json.dumps(result) if options["json"] else report(result))
    return 0
