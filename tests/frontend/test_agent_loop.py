"""A coding agent's session of several turns, in the shapes that Claude Code sends, for every tool format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.agent_server import AgentServer, running
from tests.frontend.tool_outputs import OUTPUTS, READ, SCHEMAS

# Written after Anthropic's public API reference and Claude Code's documentation.
EPHEMERAL = {"type": "ephemeral"}
NUM_OTHER_TOOLS = 40


def agent_tools() -> list[dict[str, Any]]:
    """Dozens, as a coding agent with a few extensions has them."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"command": {"type": "string", "description": "What to run"}, "timeout": {"type": "number"}},
        "required": ["command"],
        "additionalProperties": False,
    }
    others = [
        {"name": f"mcp__server__tool_{i}", "description": f"Tool {i}.", "input_schema": schema}
        for i in range(NUM_OTHER_TOOLS)
    ]
    own = [{"name": name, "description": f"To {name}.", "input_schema": s} for name, s in SCHEMAS.items()]
    return [*own, *others[:-1], others[-1] | {"cache_control": EPHEMERAL}]


def request(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "default",
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={len(messages):05x};"},
            {"type": "text", "text": "You are a coding agent.", "cache_control": EPHEMERAL},
            {"type": "text", "text": "# Environment\nplatform: darwin", "cache_control": EPHEMERAL | {"ttl": "1h"}},
        ],
        "messages": messages,
        "tools": agent_tools(),
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": "user_0_account__session_1"},
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "temperature": 1,
    }


def ask(agent: AgentServer, messages: list[dict[str, Any]]) -> Any:
    """One streamed turn, counted first as clients do to watch their context."""
    body = request(messages)
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    counted = {k: body[k] for k in ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config")}
    response = agent.server.http.post("/v1/messages/count_tokens?beta=true", json=counted, headers=headers)
    response.raise_for_status()
    with agent.anthropic() as client:
        options = {key: body[key] for key in ("temperature", "context_management", "output_config", "system", "tools")}
        with client.messages.stream(
            model="default",
            max_tokens=body["max_tokens"],
            messages=messages,  # type: ignore[arg-type]  # JSON as recorded
            extra_headers=headers,
            extra_query={"beta": "true"},
            extra_body=options | {key: body[key] for key in ("tool_choice", "metadata", "thinking")},
        ) as stream:
            message = stream.get_final_message()
    assert message.usage.input_tokens == response.json()["input_tokens"]
    return message


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_tool_loop_of_several_turns(name: str, tmp_path: Path) -> None:
    with running(tmp_path, tool_parser=name, reasoning_parser="think") as agent:
        agent.reset(OUTPUTS[name], OUTPUTS[name], "All done.", chunk=5)
        messages: list[dict[str, Any]] = [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"},
                    {"type": "text", "text": "Fix the bug", "cache_control": EPHEMERAL},
                ],
            }
        ]
        for num_turn in range(2):
            message = ask(agent, messages)
            assert message.stop_reason == "tool_use"
            calls = [block for block in message.content if block.type == "tool_use"]
            assert [(call.name, call.input) for call in calls] == [("read", READ), ("stop", {})]
            content = json.loads(message.model_dump_json(exclude_none=True, include={"content"}))["content"]
            messages.append({"role": "assistant", "content": content})
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": calls[0].id,
                    "content": [{"type": "text", "text": f"line {num_turn}"}],
                },
                {"type": "tool_result", "tool_use_id": calls[1].id, "content": "refused", "is_error": True},
            ]
            messages.append({"role": "user", "content": results})
        last = ask(agent, messages)
        assert (last.stop_reason, last.content[0].text) == ("end_turn", "All done.")
        first, second, third = agent.prompts
        assert "mcp__server__tool_39" in first
        assert "x-anthropic-billing-header" not in first
        assert "line 0" in second
        assert "Error: refused" in third
        # What is said once stays as it is, so that the next turn finds it in the prefix cache.
        assert second.startswith(first[: first.rindex("<|im_start|>assistant")])
        assert third.startswith(second[: second.rindex("<|im_start|>assistant")])
