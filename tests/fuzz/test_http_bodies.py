"""Mutated HTTP bodies on every endpoint that takes one: an answer or a 4xx, never a 500, never silence."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from tests.frontend.conftest import RunningServer, engine, ids, server, settings, start_server
from tests.fuzz.random_messages import damaged
from tests.fuzz.scale import SEED, count
from tests.support.fake_engine import FakeEngine, says

__all__ = ["engine", "server", "settings", "start_server"]  # fixtures

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "default", "messages": [USER], "max_tokens": 4, "temperature": 0.5, "seed": 1}),
    (
        "/v1/chat/completions",
        {"model": "default", "stream": True, "stream_options": {"include_usage": True}, "n": 2, "stop": ["x"],
         "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "top_p": 0.5, "top_k": 3, "min_p": 0.1,
         "messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, USER,
                      {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "tool_call_id": "call_1", "content": "1"}]},
    ),
    ("/v1/chat/completions", {"model": "default", "messages": [USER], "tools": [TOOL], "tool_choice": "auto",
                              "response_format": {"type": "text"}, "chat_template_kwargs": {"a": 1}}),
    ("/v1/completions", {"model": "default", "prompt": ["a", "b"], "max_tokens": 3, "logprobs": 1, "echo": False}),
    ("/v1/completions", {"model": "default", "prompt": [[1, 2], [3]], "stream": True, "stop": "a", "min_tokens": 1}),
    ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": [USER], "system": "s", "stop_sequences": ["q"],
                      "thinking": {"type": "disabled"}, "metadata": {"user_id": "u"}, "stream": True}),
    ("/v1/messages", {"model": "default", "max_tokens": 4, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
    ("/v1/responses", {"model": "default", "input": "Hi", "max_output_tokens": 4, "store": False, "instructions": "i"}),
    ("/v1/responses", {"model": "default", "stream": True, "max_output_tokens": 4, "store": False, "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"}],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "tool_choice": "auto",
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "metadata": {"a": "b"}}),
    ("/v1/embeddings", {"model": "default", "input": ["a", "b"], "encoding_format": "float"}),
    ("/v1/messages/count_tokens", {"model": "default", "messages": [USER]}),
    ("/tokenize", {"model": "default", "prompt": "abc"}),
    ("/detokenize", {"model": "default", "tokens": [5, 6]}),
]  # fmt: skip
WILD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, -1e308, 1e-308, "", "a",
    "\0", "\ud800", "\U0001f44d" * 50, "a" * 5000, "{{ 7 * 7 }}", "{% for x in range(10) %}", "<|im_start|>", [], {},
    [[]], [{}], [None], {"": None}, {"type": "text"}, {"type": "image_url", "image_url": {"url": "http://127.0.0.1"}},
    [0] * 3000, ["a"] * 200, {"role": "user"}, "text", "function", "image", "default", "max_tokens",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A few values replaced, dropped, moved or wrapped."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        choices = places(body)
        if not choices:
            break
        *parents, last = rng.choice(choices)
        owner: Any = body
        for key in parents:
            owner = owner[key]
        match rng.randrange(6):
            case 0 if isinstance(owner, dict):
                del owner[last]
            case 1:
                owner[last] = [owner[last]] * rng.choice((1, 3))
            case 2 if isinstance(owner, dict):
                owner[rng.choice(("unknown", "", "n", "tools", "stop", "type", "role"))] = copy.deepcopy(owner[last])
            case 3:
                owner[last] = {"type": "text", "text": owner[last]}
            case _:
                owner[last] = copy.deepcopy(rng.choice(WILD))
    return body


def test_no_body_gives_a_500(server: RunningServer, engine: FakeEngine) -> None:
    engine.on_submit = says(ids("abcd"), finish_reason="length")
    rng = random.Random(SEED)
    statuses: dict[int, int] = {}
    for number in range(count(1000, 20_000)):
        path, body = rng.choice(BODIES)
        content = json.dumps(mutated(body, rng)).encode()
        if rng.random() < 0.25:
            content = damaged(content, rng)
        response = server.http.post(path, content=content, headers={"content-type": "application/json"})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code not in (200, 400, 404):
            pytest.fail(f"body {number} to {path}: {response.status_code} {response.text[:300]}\n{content[:2000]!r}")
        if response.status_code == 200 and b'"error":{' in response.content:
            pytest.fail(f"body {number} to {path}: {response.text[-500:]}\n{content[:2000]!r}")
        if response.status_code != 200:
            assert response.json()["error"]["message"]
    assert statuses[200] > 20 and statuses[400] > 200, statuses
    assert server.http.get("/health").json()["num_open_requests"] == 0
