"""Tools and reasoning in chat completions, through the openai SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from shared.messages import Cancel
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.conftest import ids
from tests.frontend.tool_outputs import OUTPUTS, READ, SCHEMAS

TOOLS = [{"type": "function", "function": {"name": n, "description": "d", "parameters": s}} for n, s in SCHEMAS.items()]
ASK: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Go"}]}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with running(tmp_path_factory.mktemp("run"), tool_parser="hermes", reasoning_parser="think") as agent:
        yield agent


@pytest.fixture
def client(agent: AgentServer) -> Iterator[openai.OpenAI]:
    with agent.server.openai() as sdk:
        yield sdk


def failures(agent: AgentServer) -> float:
    page = agent.server.http.get("/metrics").text
    lines = [line for line in page.splitlines() if line.startswith("tandem:tool_call_parse_failures_total ")]
    return float(lines[0].split()[1])


def test_whole_answer_with_two_calls(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("<think>I see</think>" + OUTPUTS["hermes"])
    choice = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="auto").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Hi"
    assert choice.message.reasoning_content == "I see"
    first, second = choice.message.tool_calls
    assert (first.function.name, json.loads(first.function.arguments)) == ("read", READ)
    assert (second.function.name, second.function.arguments, second.type) == ("stop", "{}", "function")
    assert first.id.startswith("call_")
    assert first.id != second.id
    assert json.dumps(SCHEMAS["read"]) in agent.prompts[0]


def test_content_is_null_beside_calls_alone(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset('<tool_call>{"name": "stop"}</tool_call>')
    assert client.chat.completions.create(**ASK, tools=TOOLS).choices[0].message.content is None


def test_stream_opens_each_call_then_sends_its_arguments_in_pieces(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("<think>I see</think>" + OUTPUTS["hermes"])
    chunks = [c.choices[0] for c in client.chat.completions.create(**ASK, tools=TOOLS, stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == "Hi"
    assert "".join(getattr(c.delta, "reasoning_content", None) or "" for c in chunks) == "I see"
    deltas = [call for c in chunks for call in c.delta.tool_calls or []]
    opening = [d for d in deltas if d.id]
    assert [(d.index, d.type, d.function.name, d.function.arguments) for d in opening] == [
        (0, "function", "read", ""),
        (1, "function", "stop", ""),
    ]
    pieces = [d.function.arguments for d in deltas if d.index == 0 and not d.id]
    assert len(pieces) > 3
    assert json.loads("".join(pieces)) == READ
    assert chunks[-1].finish_reason == "tool_calls"


def test_sdk_helper_and_async_client(agent: AgentServer) -> None:
    async def ask() -> Any:
        async with (
            openai.AsyncOpenAI(base_url=f"{agent.server.url}/v1", api_key="none", max_retries=0) as sdk,
            sdk.chat.completions.stream(**ASK, tools=TOOLS) as stream,
        ):
            return await stream.get_final_completion()

    agent.reset(OUTPUTS["hermes"])
    message = asyncio.run(ask()).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["read", "stop"]
    assert json.loads(message.tool_calls[0].function.arguments) == READ


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_engine_stops_after_the_first(
    agent: AgentServer, client: openai.OpenAI, stream: bool
) -> None:
    agent.reset()
    agent.engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids(OUTPUTS["hermes"]))
    answer = client.chat.completions.create(**ASK, tools=TOOLS, parallel_tool_calls=False, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        names = [call.function.name for c in choices for call in c.delta.tool_calls or [] if call.id]
        reason = choices[-1].finish_reason
    else:
        names = [call.function.name for call in answer.choices[0].message.tool_calls]
        reason = answer.choices[0].finish_reason
    assert (names, reason) == (["read"], "tool_calls")
    assert agent.engine.wait_for(Cancel)[0].reason == "stop_string"


@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_call_is_text_and_counted(agent: AgentServer, client: openai.OpenAI, stream: bool) -> None:
    text = '<tool_call>{"name": "read", "arguments": {"path": "x'
    before = failures(agent)
    agent.reset(text)
    answer = client.chat.completions.create(**ASK, tools=TOOLS, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        content, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
    else:
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.choices[0].message.tool_calls is None
    assert (content, reason) == (text, "stop")
    assert failures(agent) == before + 1


def test_tool_choice_none_tells_the_model_nothing_of_tools(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset('<tool_call>{"name": "stop"}</tool_call>')
    choice = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="none").choices[0]
    assert (choice.message.content, choice.finish_reason) == ('<tool_call>{"name": "stop"}</tool_call>', "stop")
    assert "<tools>" not in agent.prompts[0]


@pytest.mark.parametrize(
    "extra",
    [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": True}],
)
def test_enable_thinking_reaches_the_template(agent: AgentServer, client: openai.OpenAI, extra: dict[str, Any]) -> None:
    agent.reset("Yes")
    client.chat.completions.create(**ASK, extra_body=extra)
    assert agent.prompts[0].endswith("</think>\n\n") == (extra != {"enable_thinking": True})


def test_history_gives_the_template_arguments_as_objects(agent: AgentServer, client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "x"}'}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "found"},
    ]
    agent.reset("Done")
    client.chat.completions.create(**ASK | {"messages": messages}, tools=TOOLS)
    assert '[call read {"path": "x"}]' in agent.prompts[0]
    assert "<|im_start|>tool\nfound<|im_end|>" in agent.prompts[0]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "tool_choice.function.name",
            "fly",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        ({"tool_choice": "auto"}, "tool_choice", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "tools[0].function.parameters",
            "not",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "name"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type", "type"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "bool"),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking", "too"),
    ],
)
def test_what_is_not_supported_is_named(agent: AgentServer, fields: dict[str, Any], param: str, words: str) -> None:
    response = agent.server.http.post("/v1/chat/completions", json=ASK | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]
