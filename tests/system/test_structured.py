"""Formats, forced calls and reasoning through the real processes, with and without drafters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import httpx
import pydantic
import pytest

from tests.support import tiny_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]


class Move(pydantic.BaseModel):
    piece: Literal["king", "queen", "pawn"]
    file: Literal["a", "b", "c"]
    takes: bool


SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 4}},
    "required": ["words"],
    "additionalProperties": False,
}


def ask(server: Server, seed: int) -> Any:
    """A grammar, a seed, logprobs and a stop string at once."""
    wish = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": f"go {seed}"}],
        "response_format": wish,
        "seed": seed,
        "temperature": 1.2,
        "logprobs": True,
        "stop": [",", "e"],
        "max_tokens": 150,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    entries = choice["logprobs"]["content"]
    return choice["message"]["content"], [e["token"] for e in entries], [e["logprob"] for e in entries]


def test_sdk_parses_a_pydantic_model(server: Server) -> None:
    with server.openai() as client:
        for seed in range(3):
            answer = client.chat.completions.parse(
                model="default",
                messages=[{"role": "user", "content": "move"}],
                response_format=Move,
                temperature=1.5,
                seed=seed,
                max_tokens=400,
            )
            assert isinstance(answer.choices[0].message.parsed, Move)


def test_grammar_seed_logprobs_and_stop_string_are_the_same_with_any_drafter(
    server: Server, model: Path, tmp_path: Path
) -> None:
    plain = [ask(server, seed) for seed in range(4)]
    assert len({text for text, _, _ in plain}) > 1
    assert all("," not in text and "e" not in text for text, _, _ in plain)
    drafter = tiny_model.write_eagle3(tmp_path / "eagle3", model)
    for changes in ({"draft_model": "ngram"}, {"draft_model": str(drafter)}):
        with Server(model, tmp_path, **changes) as drafting:
            for seed, (text, tokens, logprobs) in enumerate(plain):
                got = ask(drafting, seed)
                assert got[:2] == (text, tokens)
                assert got[2] == pytest.approx(logprobs, abs=1e-3)


def test_a_regex_with_other_requests_around_it(server: Server) -> None:
    body = {"model": "default", "prompt": "x", "max_tokens": 60, "structured_outputs": {"regex": "(ab|cd){2,3}"}}
    text = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    assert set(zip(text[::2], text[1::2], strict=True)) <= {("a", "b"), ("c", "d")} and len(text) in (4, 6)
    bad = httpx.post(f"{server.url}/v1/completions", json=body | {"structured_outputs": {"regex": "("}}, timeout=60)
    assert bad.status_code == 400 and json.loads(bad.content)["error"]["param"] == "structured_outputs.regex"
