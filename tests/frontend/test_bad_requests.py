"""Every field that is unknown, unsupported or out of range gives a 400 that names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.config import Settings
from shared.messages import Submit
from tests.frontend.conftest import RunningServer, byte_text
from tests.support.fake_engine import FakeEngine, says

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEngine]:
    """One server for the whole table; no case of it reaches the engine."""
    folder: Path = tmp_path_factory.mktemp("run")
    settings = Settings(run_dir=str(folder), heartbeat_interval_s=0.2)
    with FakeEngine(settings.engine_endpoint) as engine:
        engine.on_submit = says([2])
        engine.server = RunningServer(settings, byte_text())  # type: ignore[attr-defined]
        engine.server.wait_status("/health", 200)  # type: ignore[attr-defined]
        yield engine
        engine.server.close()  # type: ignore[attr-defined]


@pytest.fixture
def http(shared_engine: FakeEngine) -> httpx.Client:
    return shared_engine.server.http  # type: ignore[attr-defined, no-any-return]


CHAT: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"suffix": "x"}, "suffix"),
    ({"functions": []}, "functions"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"49152": 1}}, "logit_bias.49152"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"top_k": 2**63}, "top_k"),
    ({"max_tokens": 2**64}, "max_tokens"),
    ({"logit_bias": {"9" * 40: 1}}, "logit_bias." + "9" * 40),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop_token_ids": [49152]}, "stop_token_ids"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "root ::= ((("}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"if": {}}}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"thinking_budget": 5}, "thinking_budget"),
    ({"thinking_budget": -1}, "thinking_budget"),
    ({"thinking_start_token": "<a>"}, "thinking_end_token"),
    ({"thinking_end_token": "</a>"}, "thinking_start_token"),
    ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "nick": "y"}]}, "messages[0].nick"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}]}, "messages[0].content[0].x"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT, ids=[param + str(i) for i, (_, param) in enumerate(CHAT)])
def test_chat_names_the_field(fields: dict[str, Any], param: str, http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"model": "default", "messages": [USER]} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1].split("[")[0] in error["message"]


COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [49152]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 2}, "n"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETIONS)
def test_completions_name_the_field(fields: dict[str, Any], param: str, http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"model": "default", "prompt": "Hi"} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 200_000, b'{"messages":[{"role":"user","content":"\\ud800"}]}']
)
def test_bodies_that_are_no_request(body: bytes, http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_prompt_and_output_over_the_context_says_the_numbers(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "x" * 100, "max_tokens": 2000})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("2048", "2100", "100", "2000"))
    alone = http.post("/v1/completions", json={"prompt": "x" * 3000})
    assert alone.status_code == 400
    assert "3000" in alone.json()["error"]["message"]


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"model": "gpt-9", "messages": [USER]})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert http.get("/v1/models/gpt-9").status_code == 404
    assert http.get("/v1/models/default").json()["id"] == "Fake-1B"
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None, "stop": None, "tools": None, "stream_options": None, "logit_bias": None},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "priority": -3},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, USER]},
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ]
        },
    ],
)
def test_harmless_fields_and_nulls_are_taken(
    fields: dict[str, Any], http: httpx.Client, shared_engine: FakeEngine
) -> None:
    shared_engine.forget_received()
    response = http.post("/v1/chat/completions", json={"model": "Fake-1B", "messages": [USER]} | fields)
    assert response.status_code == 200, response.text
    assert shared_engine.wait_for(Submit)[0].priority == fields.get("priority", 0)
