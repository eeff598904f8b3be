"""What the Responses API does not take gives a 400 that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.frontend.agent_server import AgentServer

FUNCTION = {"type": "function", "name": "f"}

CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "missing"),
    ({"input": 5}, "input", "str"),
    ({"input": []}, "input", "empty"),
    ({"inputs": "x"}, "inputs", "unknown"),
    ({"input": [{"type": "message", "role": "wizard", "content": "x"}]}, "input[0].role", "wizard"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
    ({"input": [{"role": "user", "content": "x", "nick": 1}]}, "input[0].nick", "unknown"),
    ({"input": [{"type": "mcp_call", "id": "x"}]}, "input[0].type", "mcp_call"),
    ({"input": [{"content": "x"}]}, "input[0].type", "missing"),
    ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0].type", "input_audio"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
        "input[0].content[0]",
        "files",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id", "'c'"),
    ({"input": [{"type": "local_shell_call_output", "output": "x"}]}, "input[0].call_id", "no call"),
    ({"tools": [{"type": "file_search"}]}, "tools[0].type", "file_search"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "mcp"),
    ({"tools": [{"type": "web_search_preview"}]}, "tools[0].type", "web_search_preview"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "name"),
    ({"tools": [FUNCTION, {"type": "custom", "name": "f"}]}, "tools[1]", "'f'"),
    ({"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}, "tools[0].environment.type", "type"),
    ({"tools": [FUNCTION | {"defer_loading": True}]}, "tools[0].defer_loading", "defer"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [FUNCTION]}, "tools": []},
        "tool_choice.tools[0]",
        "no such",
    ),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "type"),
    ({"background": True, "store": False}, "background", "store"),
    ({"stream_options": {}}, "stream_options", "stream"),
    ({"include": ["file_search_call.results"]}, "include[0]", "file_search"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
    ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
    ({"max_output_tokens": 0}, "max_output_tokens", "1"),
    ({"top_logprobs": 21}, "top_logprobs", "20"),
    ({"temperature": 2.1}, "temperature", "2"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
    ({"reasoning": {"summary": "auto", "generate_summary": "auto"}}, "reasoning.generate_summary", "summary"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "low"),
    ({"truncation": "middle"}, "truncation", "middle"),
    ({"service_tier": "priority"}, "service_tier", "priority"),
    ({"conversation": "conv_1"}, "conversation", "unknown"),
    ({"prompt": {"id": "x"}}, "prompt", "unknown"),
]


@pytest.mark.parametrize(("fields", "param", "words"), CASES, ids=[f"{p}-{i}" for i, (_, p, _) in enumerate(CASES)])
def test_it_is_named(agent: AgentServer, fields: dict[str, Any], param: str, words: str) -> None:
    body = json.dumps({"model": "default", "input": "Go"} | fields)
    response = agent.server.http.post("/v1/responses", content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert words in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("query", "param"), [("stream=perhaps", "stream"), ("starting_after=1", "starting_after"), ("page=2", "page")]
)
def test_queries_are_checked(agent: AgentServer, query: str, param: str) -> None:
    agent.reset("Hello")
    made = agent.server.http.post("/v1/responses", json={"input": "Go"}).json()
    response = agent.server.http.get(f"/v1/responses/{made['id']}?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert agent.server.http.get(f"/v1/responses/{made['id']}?include[]=reasoning.encrypted_content").status_code == 200
    assert agent.server.http.get(f"/v1/responses/{made['id']}?stream=true").status_code == 400
