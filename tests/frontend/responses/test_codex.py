"""A session of Codex CLI, in the shapes that it sends: a tool loop of several turns for every tool format.

Written after Codex's public configuration reference and the documentation of the Responses API.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frontend import output_parser
from frontend.output_parser import OutputParser
from frontend.pieces import Pieces
from frontend.responses.output import OutputItems
from frontend.responses.schemas import FunctionTool
from frontend.responses.tools import table
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.conftest import TOKENIZER
from tests.frontend.tool_outputs import OUTPUTS, READ, SCHEMAS, output_format

NUM_OTHER_TOOLS = 30
GRAMMAR = r"""start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: "*** " ("Add" | "Update" | "Delete") " File: " /(.+)/ LF line*
line: /[-+ @](.*)/ LF
%import common.LF
"""


def codex_tools() -> list[dict[str, Any]]:
    schema = {
        "type": "object",
        "properties": {"cmd": {"type": "string", "description": "Shell command"}, "yield_time_ms": {"type": "number"}},
        "required": ["cmd"],
        "additionalProperties": False,
    }
    own = [
        {"type": "function", "name": name, "description": f"To {name}.", "strict": False, "parameters": s}
        for name, s in SCHEMAS.items()
    ]
    others = [
        {
            "type": "function",
            "name": f"mcp__server__tool_{i}",
            "description": "x",
            "strict": False,
            "parameters": schema,
        }
        for i in range(NUM_OTHER_TOOLS)
    ]
    patch = {"type": "custom", "name": "apply_patch", "description": "Edit files.",
             "format": {"type": "grammar", "syntax": "lark", "definition": GRAMMAR}}  # fmt: skip
    return [*own, *others, patch, {"type": "web_search", "external_web_access": False}]


def request(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "default",
        "instructions": "You are a coding agent running in a terminal.",
        "input": items,
        "tools": codex_tools(),
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-session",
        "client_metadata": {"x-codex-installation-id": "0199"},
        "text": {"verbosity": "medium"},
    }


def ask(agent: AgentServer, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One turn as Codex reads it: items from output_item.done, the end from response.completed."""
    response = agent.server.http.post("/v1/responses", json=request(items))
    assert response.status_code == 200, response.text
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["id"]
    usage = events[-1]["response"]["usage"]
    assert all(type(usage[key]) is int for key in ("input_tokens", "output_tokens", "total_tokens"))
    assert type(usage["input_tokens_details"]["cached_tokens"]) is int
    added: set[int] = set()
    for event in events:  # Codex drops deltas of items that it has not heard of
        if event["type"] == "response.output_item.added":
            added.add(event["output_index"])
        elif event["type"].endswith(".delta"):
            assert event["output_index"] in added
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


def as_codex_sends(item: dict[str, Any]) -> dict[str, Any]:
    """Without ids, and reasoning as its summary and its encrypted content."""
    kept = {key: value for key, value in item.items() if key not in ("id", "status")}
    if kept["type"] == "reasoning":
        kept.pop("content", None)
    return kept


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_tool_loop_of_several_turns(name: str, tmp_path: Path) -> None:
    thought = "" if name == "harmony" else "<think>Look first.</think>"
    final = "<|channel|>final<|message|>All done." if name == "harmony" else "All done."
    with running(tmp_path, tool_parser=name, reasoning_parser="think") as agent:
        agent.reset(thought + OUTPUTS[name], thought + OUTPUTS[name], final, chunk=5)
        items: list[dict[str, Any]] = [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions/>"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment_context/>"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix the bug"}]},
        ]
        for num_turn in range(2):
            done = ask(agent, items)
            calls = [item for item in done if item["type"] == "function_call"]
            assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [("read", READ), ("stop", {})]
            assert [i["content"][0]["text"] for i in done if i["type"] == "message"] == ["Hi"]
            if thought:
                assert done[0]["summary"] == [{"type": "summary_text", "text": "Look first."}]
            items += [as_codex_sends(item) for item in done]
            items += [
                {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": f"line {num_turn}"},
                {"type": "function_call_output", "call_id": calls[1]["call_id"], "output": "aborted"},
            ]
        (message,) = ask(agent, items)
        assert message["content"][0]["text"] == "All done."
        first, second, third = agent.prompts
        assert "mcp__server__tool_29" in first
        assert "web_search" not in first
        assert "line 0" in second
        if thought:
            assert "<think>Look first.</think>Hi" in second
        # What is said once stays as it is, so that the next turn finds it in the prefix cache.
        assert second.startswith(first[: first.rindex("<|im_start|>assistant")])
        assert third.startswith(second[: second.rindex("<|im_start|>assistant")])


@pytest.mark.parametrize("name", OUTPUTS)
def test_items_are_the_same_at_every_border(name: str) -> None:
    """The output in two pieces, cut at each place, and one character at a time."""
    text = OUTPUTS[name]
    cuts = [[text[:i], text[i:]] for i in range(1, len(text))] + [list(text)]
    found = [plain_items(name, pieces) for pieces in cuts]
    assert found[0] == [
        ("message", "Hi"),
        ("function_call", "read", READ),
        ("function_call", "stop", {}),
    ]
    assert all(items == found[0] for items in found)


def plain_items(name: str, pieces: list[str]) -> list[tuple[Any, ...]]:
    request = output_parser.Request(output_format=output_format(name), prompt="", tools=SCHEMAS)
    parser = OutputParser(request)
    known = table([FunctionTool(name=tool, parameters=schema) for tool, schema in SCHEMAS.items()], "auto")
    output = OutputItems(known, Pieces(TOKENIZER), shows_summary=False, seal=None, has_logprobs=False)
    events = []
    for piece in pieces:
        for event in parser.feed(piece):
            events += output.show(event, ())
    for event in parser.close():
        events += output.show(event, ())
    events += output.close()
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output.items
    return [
        ("message", item["content"][0]["text"])
        if item["type"] == "message"
        else (item["type"], item["name"], json.loads(item["arguments"]))
        for item in done
    ]


def test_compaction_as_codex_asks_for_it(tmp_path: Path) -> None:
    with running(tmp_path, tool_parser="hermes", reasoning_parser="think") as agent:
        agent.reset("The bug is in a.py.", "Fixed.")
        history = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix the bug"}]}]
        body = request(history)
        asked = {key: body[key] for key in ("model", "input", "instructions", "tools", "parallel_tool_calls")}
        asked |= {key: body[key] for key in ("reasoning", "prompt_cache_key", "text")}
        response = agent.server.http.post("/v1/responses/compact", json=asked)
        assert response.status_code == 200, response.text
        output = response.json()["output"]
        assert output[-1]["type"] == "compaction"
        (message,) = ask(agent, [*(as_codex_sends(item) for item in output), history[0]])
        assert message["content"][0]["text"] == "Fixed."
        assert "The bug is in a.py." in agent.prompts[1]
