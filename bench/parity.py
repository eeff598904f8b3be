"""Are answers with a drafter those of plain decoding, and where not: was it a tie?

In float32 they are the same. In bfloat16 a verify of several tokens rounds otherwise than a step of one, and so does a
batch of another size: where the two most likely tokens are nearly equal, either text is right. So each text that parts
from the plain one is taken to the plain server again, with log-probabilities, and the two tokens at the parting are
compared. It works with any server that answers `top_logprobs`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import msgspec

from bench.load import PATHS, Target
from bench.workloads import Prompt

TOP = 10  # alternatives asked for at each position
_END = re.compile(rb"<[^<>\s]+>")  # how a token that ends an answer is written: <|im_end|>, </s>, <eos>

Verdict = Literal["tie", "other", "unresolved"]


class Parting(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how an answer parts from the plain one.

    "tie": the plain model gives both tokens nearly the same log-probability. "other": it does not, which is an error of
    the server. "unresolved": asked again, the plain server parted from both texts before, or does not list a token.
    """

    verdict: Verdict
    at_char: int  # first character that differs
    gap: float | None = None  # between the two log-probabilities, in nats


def first_difference(a: str, b: str) -> int | None:
    """Index of the first character that differs (the shorter one's length if it is all alike); None if equal."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def judge(client: httpx.Client, target: Target, prompt: Prompt, plain: str, other: str, bound: float) -> Parting:
    """Ask the plain server again and look at the parting.

    Args:
        bound: log-probabilities that are no further apart than this, in nats, are a tie.
    Raises:
        httpx.HTTPError: the server did not answer, or not with 200.
        ValueError: its answer has no log-probabilities.
    """
    at = first_difference(plain, other)
    assert at is not None, "equal texts do not part"
    body = msgspec.structs.replace(target, extra_body=target.extra_body | {"logprobs": True, "top_logprobs": TOP})
    asked = body.body(prompt) | {"stream": False}
    asked.pop("stream_options")
    answer = client.post(PATHS["chat"], json=asked, headers=target.headers | prompt.headers, timeout=target.timeout_s)
    answer.raise_for_status()
    try:
        entries = answer.json()["choices"][0]["logprobs"]["content"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the answer has no log-probabilities: {error!r}") from error
    gap = _gap(entries, plain.encode(), other.encode())
    verdict: Verdict = "unresolved" if gap is None else "tie" if gap <= bound else "other"
    return Parting(verdict=verdict, at_char=at, gap=gap)


def _gap(entries: Sequence[dict[str, Any]], plain: bytes, other: bytes) -> float | None:
    """Difference of the log-probabilities of the two texts' tokens where they part; None where it cannot be told."""
    done = b""
    for entry in entries:
        choices = {_bytes(e): float(e["logprob"]) for e in [*entry.get("top_logprobs", []), entry]}
        one, two = _token(choices, plain[len(done) :]), _token(choices, other[len(done) :])
        if one is None or two is None:
            return None
        if one != two:
            return abs(choices[one] - choices[two])
        done += _bytes(entry)
        if not (plain.startswith(done) or other.startswith(done)):
            return None  # a tie fell differently this time, before the one that is looked for
    return None


def _token(choices: dict[bytes, float], rest: bytes) -> bytes | None:
    """The likeliest of these tokens that `rest` starts with; with nothing left, the one that ends an answer."""
    fitting = [t for t in choices if t and rest.startswith(t)] if rest else [t for t in choices if _END.fullmatch(t)]
    return max(fitting, key=choices.__getitem__, default=None)


def _bytes(entry: dict[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") else str(entry["token"]).encode()
