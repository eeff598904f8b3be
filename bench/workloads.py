"""Seeded workloads: which prompts, how long, arriving when. The same seed gives the same texts on every machine.

Lengths are tokens of the prompt's text; a chat template adds its own (about 30 for SmolLM2), which `usage` shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol

import httpx
import msgspec

from bench.words import WORDS

MAX_FIT_ROUNDS = 24  # each round leaves about a third of the error where words have one or two tokens
# Random words alone make SmolLM2 stop after a few tokens; with a task at the end it writes on.
TASK = "Now write a long story with these words."
MIN_TOKENS_WITH_TASK = 16
SEED_STRIDE = 1_000_003  # keeps the seeds of warm-up and loads apart


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a workload looks like. With `mixed` the own length of a prompt is uniform in it, else `prompt_tokens`."""

    num_requests: int
    prompt_tokens: int = 64  # each prompt's own tokens, after the shared prefix
    output_tokens: int = 128
    shared_prefix: int = 0  # tokens that all prompts start with
    mixed: tuple[int, int] | None = None  # shortest and longest own length, both included
    request_rate: float | None = None  # requests per second, Poisson; None: closed loop


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a workload."""

    index: int
    text: str
    num_tokens: int  # as counted (or estimated) when the text was made
    max_tokens: int
    arrival_s: float | None = None  # open loop: seconds after the start
    headers: dict[str, str] = {}  # of this request alone
    messages: list[dict[str, str]] | None = None  # a whole conversation, in place of `text`


class TokenCounter(Protocol):
    """Counts the tokens of a text, without special tokens. `source` says how, for the results file."""

    source: str

    def __call__(self, text: str) -> int: ...


class EstimatedCounter:
    """One token a word: right for `WORDS` in SmolLM2's vocabulary, near in others."""

    source = "estimated"

    def __call__(self, text: str) -> int:
        return len(text.split())


class LocalCounter:
    """Counts with a Hugging Face tokenizer in a local folder."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        self.source = f"tokenizer {folder}"
        self._tokenizer: Any = Tokenizer.from_file(f"{folder}/tokenizer.json")

    def __call__(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


class ServerCounter:
    """Counts with the server's own `/tokenize` (vLLM's request: `prompt`, `add_special_tokens`; answer: `count`)."""

    def __init__(self, url: str, model: str, headers: dict[str, str] | None = None) -> None:
        self.source = "server /tokenize"
        self._model = model
        self._client = httpx.Client(base_url=url, headers=headers, timeout=10.0)

    def __call__(self, text: str) -> int:
        """Raises httpx.HTTPError or ValueError: the server has no such endpoint, or answers in another shape."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        response = self._client.post("/tokenize", json=body)
        response.raise_for_status()
        answer = response.json()
        if isinstance(answer, dict) and isinstance(answer.get("count"), int):
            return int(answer["count"])
        if isinstance(answer, dict) and isinstance(answer.get("tokens"), list):
            return len(answer["tokens"])
        raise ValueError("/tokenize answered neither count nor tokens")

    def close(self) -> None:
        self._client.close()


def choose_counter(
    url: str, model: str, tokenizer: str | None, headers: dict[str, str] | None = None
) -> tuple[TokenCounter, Callable[[], None]]:
    """The best counter at hand and what to call when done: a given tokenizer, else `/tokenize`, else an estimate."""
    if tokenizer is not None:
        return LocalCounter(tokenizer), lambda: None
    server = ServerCounter(url, model, headers)
    try:
        server("one two three")
    except (httpx.HTTPError, ValueError):
        server.close()
        return EstimatedCounter(), lambda: None
    return server, server.close


def build(shape: Shape, seed: int, count: TokenCounter) -> list[Prompt]:
    """The workload's requests in order of arrival."""
    rng = random.Random(seed)
    prefix = fit(rng, shape.shared_prefix, count) if shape.shared_prefix else ""
    prompts = []
    arrival_s = 0.0
    for index in range(shape.num_requests):
        own_tokens = rng.randint(*shape.mixed) if shape.mixed else shape.prompt_tokens
        task = TASK if own_tokens >= MIN_TOKENS_WITH_TASK else ""
        text = fit(rng, shape.shared_prefix + own_tokens, count, prefix, task)
        if shape.request_rate is not None:
            arrival_s += rng.expovariate(shape.request_rate)
        prompts.append(
            Prompt(
                index=index,
                text=text,
                num_tokens=count(text),
                max_tokens=shape.output_tokens,
                arrival_s=arrival_s if shape.request_rate is not None else None,
            )
        )
    return prompts


def fit(rng: random.Random, num_tokens: int, count: TokenCounter, start: str = "", end: str = "") -> str:
    """Random words between `start` and `end`: `num_tokens` tokens in all, or the nearest found in a few rounds."""

    def joined() -> str:
        return " ".join(part for part in (start, *words, end) if part)

    words: list[str] = []
    best = joined()
    missing = num_tokens - count(best) if best else num_tokens
    best_error: int | None = None
    for _ in range(MAX_FIT_ROUNDS):
        if missing > 0:
            words += rng.choices(WORDS, k=missing)
        else:
            del words[max(1, len(words) + missing) :]
        text = joined()
        missing = num_tokens - count(text)
        if best_error is None or abs(missing) < best_error:
            best, best_error = text, abs(missing)
        if missing == 0:
            break
    return best


def parse_range(text: str) -> tuple[int, int]:
    """ "24-600" -> (24, 600). Raises ValueError: not two growing positive numbers."""
    low, _, high = text.partition("-")
    pair = int(low), int(high)
    if not 0 < pair[0] <= pair[1]:
        raise ValueError(f"{text!r} is not a range like 24-600")
    return pair
