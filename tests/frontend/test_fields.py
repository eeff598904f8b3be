"""Every field of the SDKs' request types either changes something or is refused by name.

The lists of fields are the SDKs' own, so that a new release that adds a field fails here until somebody decides.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params as text_params
from openai.types import embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import input_token_count_params, response_compact_params, response_create_params

from shared.messages import Submit, TokenLogprob, TopLogprob
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.conftest import EOS, ids
from tests.frontend.tool_outputs import OUTPUTS, SCHEMAS
from tests.support.fake_engine import FakeEngine

Json = dict[str, Any]

PNG = "data:image/png;base64,iVBORw0KGgo="
FLAT_TOOLS = [{"type": "function", "name": n, "description": "d", "parameters": s} for n, s in SCHEMAS.items()]
CHAT_TOOLS = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
CLAUDE_TOOLS = [{"name": n, "input_schema": s} for n, s in SCHEMAS.items()]
TURN = [{"role": "user", "content": "Go"}]
REASONED = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "old"}]}, *TURN]

# What is sent anyway, for each route, and what is never compared because it is drawn or is the time.
ROUTES: dict[str, tuple[Json, list[type]]] = {
    "/v1/responses": ({"model": "default", "input": "Go"}, [response_create_params.ResponseCreateParamsStreaming]),
    "/v1/responses/compact": ({"model": "default", "input": "Go"}, [response_compact_params.ResponseCompactParams]),
    "/v1/responses/input_tokens": ({"input": "Go"}, [input_token_count_params.InputTokenCountParams]),
    "/v1/chat/completions": (
        {"model": "default", "messages": TURN},
        [chat_params.CompletionCreateParamsBase, chat_params.CompletionCreateParamsStreaming],
    ),
    "/v1/completions": (
        {"model": "default", "prompt": "Go"},
        [text_params.CompletionCreateParamsBase, text_params.CompletionCreateParamsStreaming],
    ),
    "/v1/messages": (
        {"model": "default", "messages": TURN, "max_tokens": 1000},
        [message_create_params.MessageCreateParamsBase, message_create_params.MessageCreateParamsStreaming],
    ),
    "/v1/messages/count_tokens": (
        {"model": "default", "messages": TURN},
        [message_count_tokens_params.MessageCountTokensParams],
    ),
    "/v1/embeddings": ({"model": "default", "input": "x"}, [embedding_create_params.EmbeddingCreateParams]),
}

# field -> values to try, each with what else has to be sent for it to mean something.
SAMPLES: dict[str, list[tuple[Any, Json]]] = {
    "access_programs": [({"cyber": "standard"}, {})],
    "audio": [({"voice": "alloy", "format": "wav"}, {})],
    "background": [(True, {})],
    "background_options": [({"completion_window": "soonest"}, {})],
    "best_of": [(3, {})],
    "cache_control": [({"type": "ephemeral"}, {})],
    "container": [("c", {})],
    "context_management": [([{"type": "compaction"}], {})],
    "conversation": [("conv_1", {})],
    "diagnostics": [({}, {})],
    "dimensions": [(3, {})],
    "echo": [(True, {})],
    "encoding_format": [("base64", {})],
    "frequency_penalty": [(1.0, {})],
    "function_call": [("auto", {})],
    "functions": [([{"name": "f"}], {})],
    "image": [({"context_compression": "auto"}, {})],
    "include": [
        (["reasoning.encrypted_content"], {}),
        (["message.output_text.logprobs"], {}),
        (["web_search_call.action.sources"], {}),
        (["message.input_image.image_url"], {}),
    ],
    "inference_geo": [("us", {})],
    "input": [([{"role": "user", "content": "Go now"}], {})],
    "instructions": [("Be brief", {})],
    "logit_bias": [({"65": 5}, {})],
    "max_completion_tokens": [(7, {})],
    "max_output_tokens": [(7, {})],
    "max_tokens": [(7, {})],
    "max_tool_calls": [(3, {})],
    "messages": [([{"role": "user", "content": "Go now"}], {})],
    "metadata": [({"user_id": "x"}, {})],
    "modalities": [(["text"], {}), (["audio"], {})],
    "model": [("nobody", {})],
    "moderation": [({"model": "m"}, {})],
    "n": [(2, {})],
    "output_config": [({"effort": "low"}, {})],
    "parallel_tool_calls": [(False, {"tools": CHAT_TOOLS}), (False, {"tools": FLAT_TOOLS})],
    "personality": [("friendly", {})],
    "prediction": [({"type": "content", "content": "x"}, {})],
    "presence_penalty": [(1.0, {})],
    "previous_response_id": [("resp_none", {})],
    "prompt": [("Go now", {}), ({"id": "p"}, {})],
    "prompt_cache_key": [("k", {})],
    "prompt_cache_options": [({"mode": "implicit"}, {})],
    "prompt_cache_retention": [("24h", {})],
    "reasoning": [
        ({"effort": "low"}, {}),
        ({"summary": "auto"}, {}),
        ({"generate_summary": "concise"}, {}),
        ({"context": "current_turn"}, {"input": REASONED}),
        ({"mode": "pro"}, {}),
    ],
    "reasoning_effort": [("low", {})],
    "response_format": [({"type": "json_object"}, {})],
    "safety_identifier": [("x", {})],
    "seed": [(5, {})],
    "service_tier": [("auto", {}), ("priority", {})],
    "speed": [("fast", {})],
    "stop": [("see", {})],
    "stop_sequences": [(["Hi"], {})],
    "store": [(False, {}), (True, {})],
    "stream": [(True, {})],
    "stream_options": [({"include_usage": True}, {"stream": True}), ({"include_obfuscation": True}, {"stream": True})],
    "suffix": [("x", {})],
    "system": [("Be brief", {})],
    "temperature": [(0.3, {})],
    "text": [({"format": {"type": "json_object"}}, {}), ({"verbosity": "low"}, {})],
    "thinking": [({"type": "enabled", "budget_tokens": 500}, {})],
    "tool_choice": [
        ("none", {"tools": CHAT_TOOLS}),
        ("none", {"tools": FLAT_TOOLS}),
        ({"type": "none"}, {"tools": CLAUDE_TOOLS}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"tools": CLAUDE_TOOLS}),
        ("required", {"tools": CHAT_TOOLS}),
        ("required", {"tools": FLAT_TOOLS}),
        ({"type": "function", "name": "stop"}, {"tools": FLAT_TOOLS}),
    ],
    "tools": [(CHAT_TOOLS, {}), (FLAT_TOOLS, {}), (CLAUDE_TOOLS, {})],
    "top_logprobs": [(2, {"logprobs": True}), (2, {})],
    "logprobs": [(True, {}), (2, {})],
    "top_p": [(0.5, {})],
    "truncation": [("auto", {"input": [{"role": "user", "content": "x" * 3000}] * 3})],
    "user": [("me", {})],
    "user_profile_id": [("x", {})],
    "verbosity": [("low", {})],
    "web_search_options": [({}, {})],
    "workspace_id": [("x", {})],
}

# What is taken and changes nothing, with the reason that docs/agents.md gives for it.
WITHOUT_EFFECT = {
    ("/v1/responses", "max_tool_calls"): "counts calls of tools that the server runs, of which there are none",
    ("/v1/messages", "metadata"): "names an end user",
}
for _path in ROUTES:
    for _field in ("user", "safety_identifier"):
        WITHOUT_EFFECT[_path, _field] = "names an end user"
    for _field in ("cache_control", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"):
        WITHOUT_EFFECT[_path, _field] = "every prefix is cached"
    WITHOUT_EFFECT[_path, "service_tier"] = "there is one tier"
for _field in ("metadata", "modalities", "store"):  # `store` may be false only
    WITHOUT_EFFECT["/v1/chat/completions", _field] = "says what happens anyway"
WITHOUT_EFFECT["/v1/responses/input_tokens", "parallel_tool_calls"] = "is not a part of the prompt"
ECHO = {"metadata"}  # to be given back is all that it is for


def fields_of(types: list[type]) -> set[str]:
    return {name for kind in types for base in kind.__mro__ for name in getattr(base, "__annotations__", ())} | {
        name for kind in types for name in kind.__annotations__
    }


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    folder = tmp_path_factory.mktemp("run")
    with running(folder, tool_parser="hermes", reasoning_parser="think") as agent:
        agent.engine.info = msgspec.structs.replace(agent.engine.info, max_model_len=8000)
        agent.engine.set_target("ready")
        agent.server.wait_status("/health", 200)
        yield agent


def speak(engine: FakeEngine, submit: Submit) -> None:
    """The same text always, with what the request asked of the engine."""
    tokens = [*ids("<think>I see</think>" + OUTPUTS["hermes"]), EOS][: submit.max_tokens]
    tops = [TopLogprob(token_id=5, logprob=-1.0)] * (submit.sampling.num_logprobs or 0)
    logprobs = (
        [TokenLogprob(logprob=-0.5, top=tops)] * len(tokens) if submit.sampling.num_logprobs is not None else None
    )
    reason = "length" if tokens[-1] != EOS else "stop"
    engine.send_output(submit.request_id, tokens, finish_reason=reason, logprobs=logprobs)  # type: ignore[arg-type]


_DRAWN = {"id", "call_id", "item_id", "tool_use_id", "created", "created_at", "completed_at", "timings", "signature",
          "encrypted_content", "request_id"}  # fmt: skip


def plain(value: Any, left_out: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {k: plain(v, left_out) if k not in _DRAWN else bool(v) for k, v in value.items() if k not in left_out}
    return [plain(v, frozenset()) for v in value] if isinstance(value, list) else value


def observe(agent: AgentServer, path: str, body: Json, field: str) -> tuple[int, Any]:
    """The status, and all that a request brings about: prompt, parameters, answer, what is kept."""
    agent.reset()
    agent.engine.on_submit = speak
    response = agent.server.http.post(path, json=body)
    if response.status_code != 200:
        return response.status_code, response.json()["error"]
    submits = []
    for submit in (m for m in agent.engine.received if isinstance(m, Submit)):
        seed = submit.sampling.seed if submit.sampling.is_seeded else 0
        sampling = msgspec.structs.replace(submit.sampling, seed=seed)
        submits.append(msgspec.to_builtins(msgspec.structs.replace(submit, request_id="", sampling=sampling)))
    if not response.headers["content-type"].startswith("application/json"):
        chunks = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
        return 200, ("stream", submits, [sorted(plain(json.loads(chunk), frozenset())) for chunk in chunks])
    answer = response.json()
    kept = agent.server.http.get(f"{path}/{answer['id']}").status_code if path == "/v1/responses" else None
    left_out = frozenset({field}) - ECHO if path == "/v1/responses" else frozenset[str]()
    return 200, (kept, submits, plain(answer, left_out))


CASES = [(path, field) for path, (_, types) in ROUTES.items() for field in sorted(fields_of(types))]


@pytest.mark.parametrize(("path", "field"), CASES)
def test_a_field_acts_or_is_refused_by_name(agent: AgentServer, path: str, field: str) -> None:
    assert field in SAMPLES, f"the SDK has a new field {field!r}: decide what it does here"
    base = ROUTES[path][0]
    has_acted = has_been_refused = False
    for value, others in SAMPLES[field]:
        before_status, before = observe(agent, path, base | others, field)
        if before_status != 200 and path != "/v1/embeddings" and field != "truncation":
            continue  # a sample for another route
        status, after = observe(agent, path, base | others | {field: value}, field)
        assert status in (200, 400, 404), after
        if status == 200:
            has_acted = has_acted or after != before
        elif path.startswith("/v1/messages"):
            assert field in after["message"] or after["type"] == "not_found_error", after
            has_been_refused = True
        elif path == "/v1/embeddings":
            has_been_refused = True  # all of it is refused
        else:
            assert (after["param"] or "").startswith(field), after
            has_been_refused = True
    if not has_acted and not has_been_refused:
        assert (path, field) in WITHOUT_EFFECT, "it is taken and does nothing"


def test_samples_belong_to_fields() -> None:
    known = set(itertools.chain.from_iterable(fields_of(types) for _, types in ROUTES.values()))
    assert set(SAMPLES) <= known | {"temperature"}
    assert {field for _, field in WITHOUT_EFFECT} <= known
