"""Responses through the openai SDK: inputs, outputs, events, limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from frontend.responses import run
from shared.messages import Submit, TokenLogprob, TopLogprob
from tests.frontend.agent_server import AgentServer
from tests.frontend.conftest import EOS, ids
from tests.frontend.tool_outputs import OUTPUTS, READ, SCHEMAS
from tests.support.fake_engine import FakeEngine, says

TOOLS: list[Any] = [
    {"type": "function", "name": n, "description": "d", "parameters": s, "strict": False} for n, s in SCHEMAS.items()
]
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
PATCH = '*** Begin Patch\n*** Update File: a "b".py\n-x\n+\té\\n 😀\n*** End Patch'


def custom_call(name: str, text: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'input': text}})}</tool_call>"


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def events_of(agent: AgentServer, **body: Any) -> list[dict[str, Any]]:
    """The events as they are on the wire, each checked against the SDK's own type."""
    response = agent.server.http.post("/v1/responses", json={"input": "Go", "stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n")[:-1]:
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_text_and_reasoning(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("<think>I see</think>Hello")
    response = client.responses.create(
        model="default", input="Hi", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, top_p=0.9
    )
    assert (response.status, response.output_text, response.error) == ("completed", "Hello", None)
    reasoning, message = response.output
    assert [part.text for part in reasoning.content] == ["I see"]
    assert reasoning.summary == []
    assert (message.role, message.status) == ("assistant", "completed")
    assert (response.metadata, response.temperature, response.top_p) == ({"a": "b"}, 0.5, 0.9)
    assert response.instructions == "Be brief."
    usage = response.usage
    assert usage.input_tokens == len(ids(agent.prompts[0]))
    assert usage.output_tokens == len(ids("<think>I see</think>Hello")) + 1
    assert usage.output_tokens_details.reasoning_tokens == len("I see")
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert agent.prompts == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ]
    sampling = agent.engine.wait_for(Submit)[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)


def test_usage_has_cached_tokens(agent: AgentServer, client: openai.OpenAI) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, [EOS], finish_reason="stop", num_cached_tokens=7)

    agent.engine.on_submit = answer
    response = client.responses.create(model="default", input="Hi")
    assert response.usage.input_tokens_details.cached_tokens == 7


def test_every_kind_of_event_in_order(agent: AgentServer) -> None:
    agent.reset("<think>I see</think>" + OUTPUTS["hermes"], chunk=7)
    events = events_of(agent, tools=TOOLS)
    kinds = [event["type"].removeprefix("response.") for event in events]
    steps = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    call_events = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
    assert steps == [
        "created",
        "in_progress",
        *["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"],
        *["content_part.done", "output_item.done"],
        *[*message, "output_item.done"],
        *[*call_events, "output_item.done"] * 2,
        "completed",
    ]
    assert kinds.count("function_call_arguments.delta") > 3
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    for index, item in enumerate(final["output"]):
        of_item = [event for event in events if event.get("output_index") == index]
        deltas = "".join(event["delta"] for event in of_item if event["type"].endswith(".delta"))
        whole = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert deltas == whole
        assert {event["item_id"] for event in of_item if "item_id" in event} == {item["id"]}
    assert json.loads(final["output"][2]["arguments"]) == READ


def test_summary_is_shown_where_it_is_asked_for(agent: AgentServer) -> None:
    agent.reset("<think>I see</think>Hello")
    events = events_of(agent, reasoning={"effort": "low", "summary": "auto"})
    kinds = {event["type"] for event in events}
    assert {f"response.reasoning_summary_{k}" for k in ("part.added", "text.delta", "text.done", "part.done")} <= kinds
    reasoning = events[-1]["response"]["output"][0]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "I see"}]
    assert "content" not in reasoning
    assert agent.prompts[0].endswith("assistant\n(low)")


@pytest.mark.parametrize("effort", ["none", "minimal", "medium", "max"])
def test_effort_reaches_the_template(agent: AgentServer, client: openai.OpenAI, effort: Any) -> None:
    agent.reset("Hello")
    client.responses.create(model="default", input="Hi", reasoning={"effort": effort})
    end = {"none": "<think>\n\n</think>\n\n", "minimal": "(low)", "medium": "(medium)", "max": "(high)"}[effort]
    assert agent.prompts[0].endswith("<|im_start|>assistant\n" + end)


def test_stream_helper_with_tools(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("<think>I see</think>" + OUTPUTS["hermes"])
    with client.responses.stream(model="default", input="Go", tools=TOOLS) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts[-1] == "Hi"
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(item.name, json.loads(item.arguments)) for item in calls] == [("read", READ), ("stop", {})]


def test_async_client(agent: AgentServer) -> None:
    async def ask() -> tuple[Any, Any]:
        async with openai.AsyncOpenAI(base_url=f"{agent.server.url}/v1", api_key="none", max_retries=0) as sdk:
            first = await sdk.responses.create(model="default", input="Hi")
            async with sdk.responses.stream(model="default", input="And?", previous_response_id=first.id) as stream:
                return first, await stream.get_final_response()

    agent.reset("Hello", "Yes")
    first, second = asyncio.run(ask())
    assert (first.output_text, second.output_text, second.previous_response_id) == ("Hello", "Yes", first.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_call_is_text(agent: AgentServer, stream: bool) -> None:
    """A stream has begun to tell of the call, so it ends it as incomplete; nothing that runs comes of it."""
    raw = '<tool_call>{"name": "read", "arguments": {"path": "x'
    agent.reset(raw)
    if stream:
        final = events_of(agent, tools=TOOLS)[-1]["response"]
        call_item, message = final["output"]
        assert (call_item["type"], call_item["status"]) == ("function_call", "incomplete")
    else:
        final = agent.server.http.post("/v1/responses", json={"input": "Go", "tools": TOOLS}).json()
        (message,) = final["output"]
    assert message["content"][0]["text"] == raw
    agent.reset("ok")
    again = agent.server.http.post("/v1/responses", json={"input": "So?", "previous_response_id": final["id"]})
    assert again.status_code == 200
    assert f"assistant\n{raw}<|im_end|>" in agent.prompts[0]
    assert "[call" not in agent.prompts[0]


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_custom_tool_input_streams_as_the_text_it_is(agent: AgentServer, chunk: int) -> None:
    agent.reset(custom_call("apply_patch", PATCH), chunk=chunk)
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'}
    tool = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": grammar}
    events = events_of(agent, tools=[tool])
    deltas = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    (done,) = [e for e in events if e["type"] == "response.custom_tool_call_input.done"]
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    assert "".join(deltas) == done["input"] == PATCH
    if chunk < 5:
        assert len(deltas) > 10
    assert "Lark grammar" in agent.prompts[0]


@pytest.mark.parametrize(
    ("arguments", "text"), [({"text": "x"}, '{"text": "x"}'), ({"a": 1, "input": "x"}, "x"), ({"input": ""}, None)]
)
def test_custom_tool_arguments_of_another_form(agent: AgentServer, arguments: Any, text: str | None) -> None:
    agent.reset(call("note", **arguments))
    (item,) = events_of(agent, tools=[{"type": "custom", "name": "note"}])[-1]["response"]["output"]
    assert item["input"] == (text or "")


SHELLS = [
    (
        {"type": "local_shell"},
        call("local_shell", command=["ls", "-l"], working_directory="/tmp", timeout_ms=5),
        "local_shell_call",
        {"action": {"type": "exec", "command": ["ls", "-l"], "env": {}, "working_directory": "/tmp", "timeout_ms": 5}},
    ),
    (
        {"type": "local_shell"},
        call("local_shell", command="ls | wc"),
        "local_shell_call",
        {"action": {"type": "exec", "command": ["bash", "-lc", "ls | wc"], "env": {}}},
    ),
    (
        {"type": "shell", "environment": {"type": "local"}},
        call("shell", commands=["ls"], timeout_ms=7),
        "shell_call",
        {"action": {"commands": ["ls"], "timeout_ms": 7, "max_output_length": None}},
    ),
    (
        {"type": "apply_patch"},
        call("apply_patch", type="update_file", path="a", diff="@@\n-x\n+y"),
        "apply_patch_call",
        {"operation": {"type": "update_file", "path": "a", "diff": "@@\n-x\n+y"}},
    ),
]


@pytest.mark.parametrize(("tool", "output", "kind", "fields"), SHELLS)
def test_shells_and_patches(agent: AgentServer, tool: Any, output: str, kind: str, fields: Any) -> None:
    agent.reset(output)
    events = events_of(agent, tools=[tool])
    (item,) = events[-1]["response"]["output"]
    assert item["type"] == kind
    assert {key: item[key] for key in fields} == fields
    assert item["status"] == "completed"


@pytest.mark.parametrize(
    ("tool", "output"),
    [
        ({"type": "local_shell"}, call("local_shell", command=5)),
        ({"type": "shell"}, call("shell", cmd="x")),
        ({"type": "apply_patch"}, call("apply_patch", type="update_file", path="a")),
    ],
)
def test_arguments_that_are_no_command_are_text(agent: AgentServer, tool: Any, output: str) -> None:
    agent.reset(output)
    (item,) = events_of(agent, tools=[tool])[-1]["response"]["output"]
    assert item["type"] == "message"
    assert json.loads(item["content"][0]["text"]) == json.loads(output[11:-12])["arguments"]


def test_namespaces(agent: AgentServer) -> None:
    inner = {"type": "function", "name": "search", "description": "Finds.", "parameters": {"type": "object"}}
    agent.reset(call("mcp__docs__search", q="x"))
    tools = [{"type": "namespace", "name": "mcp__docs__", "description": "Docs.", "tools": [inner]}]
    (item,) = events_of(agent, tools=tools)[-1]["response"]["output"]
    assert (item["name"], item["namespace"], item["arguments"]) == ("search", "mcp__docs__", '{"q": "x"}')
    assert "Docs.\\nFinds." in agent.prompts[0]


def test_web_search_is_left_out(agent: AgentServer) -> None:
    """Codex declares it unless told not to."""
    agent.reset("Hello")
    events_of(agent, tools=[*TOOLS, {"type": "web_search", "external_web_access": False}])
    assert "web_search" not in agent.prompts[0]
    assert '"read"' in agent.prompts[0]


def test_allowed_tools(agent: AgentServer) -> None:
    agent.reset("Hello")
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "stop"}]}
    events_of(agent, tools=TOOLS, tool_choice=choice)
    assert '"stop"' in agent.prompts[0]
    assert '"read"' not in agent.prompts[0]


def test_tool_choice_none(agent: AgentServer) -> None:
    agent.reset(OUTPUTS["hermes"])
    (item,) = events_of(agent, tools=TOOLS, tool_choice="none")[-1]["response"]["output"]
    assert item["content"][0]["text"] == OUTPUTS["hermes"]
    assert "<tools>" not in agent.prompts[0]


def test_without_parallel_calls(agent: AgentServer) -> None:
    agent.reset(OUTPUTS["hermes"])
    output = events_of(agent, tools=TOOLS, parallel_tool_calls=False)[-1]["response"]["output"]
    assert [item["name"] for item in output if item["type"] == "function_call"] == ["read"]


@pytest.mark.parametrize("stream", [False, True])
def test_max_output_tokens(agent: AgentServer, client: openai.OpenAI, stream: bool) -> None:
    agent.engine.on_submit = says(ids("Hello world"))
    if stream:
        last = events_of(agent, max_output_tokens=5)[-1]
        assert last["type"] == "response.incomplete"
        response = last["response"]
    else:
        response = client.responses.create(model="default", input="Hi", max_output_tokens=5).model_dump()
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hello")
    assert response["usage"]["output_tokens"] == 5


def logprob(token_id: int) -> TokenLogprob:
    tops = [TopLogprob(token_id=token_id, logprob=-0.5), TopLogprob(token_id=5, logprob=-2.0)]
    return TokenLogprob(logprob=-0.5, top=tops)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(agent: AgentServer, stream: bool) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        assert submit.sampling.num_logprobs == 2
        for piece in ("<think>", "x", "</think>", "A", "b"):
            tokens = ids(piece)
            engine.send_output(submit.request_id, tokens, logprobs=[logprob(t) for t in tokens])
        engine.send_output(submit.request_id, [EOS], finish_reason="stop", logprobs=[logprob(EOS)])

    agent.engine.on_submit = answer
    body = {"input": "Go", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    if stream:
        events = events_of(agent, **body)
        response = events[-1]["response"]
        deltas = [entry for e in events if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
        assert deltas == response["output"][1]["content"][0]["logprobs"]
    else:
        response = agent.server.http.post("/v1/responses", json=body).json()
    entries = response["output"][1]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["A", "b"]
    assert entries[0]["logprob"] == -0.5
    assert len(entries[0]["top_logprobs"]) == 2


def test_an_engine_failure_ends_a_stream_with_failed(agent: AgentServer) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("Hello there"))
        engine.send_output(submit.request_id, [], finish_reason="error")

    agent.engine.on_submit = answer
    last = events_of(agent)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][0]["status"] == "incomplete"
    response = agent.server.http.post("/v1/responses", json={"input": "Go"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failure"


def test_history_of_every_kind_of_item(agent: AgentServer, client: openai.OpenAI) -> None:
    history: list[Any] = [
        {"role": "developer", "content": "Rules"},
        {"role": "user", "content": [{"type": "input_text", "text": "Fix"}, {"type": "input_text", "text": "it"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Sure", "annotations": []}], "id": "msg_1",
         "type": "message", "status": "completed"},
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"path": "x"}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "note", "input": "a\nb"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "found"}]},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "noted"},
        {"type": "local_shell_call", "id": "lsh_1", "call_id": "c3", "status": "completed",
         "action": {"type": "exec", "command": ["ls"], "env": {"A": "b"}}},
        {"type": "local_shell_call_output", "id": "lsh_1", "output": "files"},
        {"type": "shell_call", "call_id": "c4", "action": {"commands": ["make"]}},
        {"type": "shell_call_output", "call_id": "c4", "output": [
            {"stdout": "out", "stderr": "err", "outcome": {"type": "exit", "exit_code": 2}},
            {"stdout": "", "stderr": "", "outcome": {"type": "timeout"}}]},
        {"type": "apply_patch_call", "call_id": "c5", "status": "completed",
         "operation": {"type": "delete_file", "path": "x"}},
        {"type": "apply_patch_call_output", "call_id": "c5", "status": "failed", "output": "no file"},
        {"role": "user", "content": "Go on"},
    ]  # fmt: skip
    agent.reset("Done")
    client.responses.create(model="default", input=history)
    turns = agent.prompts[0].removeprefix("<|im_start|>").split("<|im_end|>\n<|im_start|>")
    assert turns == [
        "system\nRules",
        "user\nFix\nit",
        'assistant\n<think>Hm</think>Sure[call read {"path": "x"}][call note {"input": "a\\nb"}]',
        "tool\nfound",
        "tool\nnoted",
        'assistant\n[call local_shell {"command": ["ls"]}]',
        "tool\nfiles",
        'assistant\n[call shell {"commands": ["make"]}]',
        "tool\nout\nstderr:\nerr\n(exit code 2)\n(timed out)",
        'assistant\n[call apply_patch {"type": "delete_file", "path": "x"}]',
        "tool\nError: no file",
        "user\nGo on",
        "assistant\n",
    ]


def test_an_output_can_be_sent_back_as_it_came(agent: AgentServer, client: openai.OpenAI) -> None:
    """Nulls and all, as SDK users append `response.output` to their input."""
    agent.reset("<think>I see</think>" + OUTPUTS["hermes"], "Done")
    first = client.responses.create(model="default", input="Go", tools=TOOLS, store=False)
    history: list[Any] = [{"role": "user", "content": "Go"}, *(item.model_dump() for item in first.output)]
    calls = [item for item in first.output if item.type == "function_call"]
    history += [{"type": "function_call_output", "call_id": c.call_id, "output": "ok"} for c in calls]
    second = client.responses.create(model="default", input=history, tools=TOOLS, store=False)
    assert second.output_text == "Done"
    before, after = agent.prompts
    assert after.startswith(before + "<think>I see</think>Hi")


def test_encrypted_reasoning_comes_back(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("<think>Secret</think>Hello", "Yes", "No")
    first = client.responses.create(
        model="default",
        input="Hi",
        store=False,
        include=["reasoning.encrypted_content"],
        reasoning={"summary": "auto"},
    )
    sealed = first.output[0].encrypted_content
    assert sealed
    item: Any = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    client.responses.create(model="default", input=[item, {"role": "user", "content": "So?"}])
    assert "<think>Secret</think>" in agent.prompts[1]
    for changed in (sealed[:-4] + "AAAA", "nonsense", "é"):
        item = {"type": "reasoning", "summary": [], "encrypted_content": changed}
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="default", input=[item, {"role": "user", "content": "So?"}])
        assert caught.value.code == "invalid_encrypted_content"
        assert caught.value.param == "input[0].encrypted_content"


def test_reasoning_of_the_current_turn_only(agent: AgentServer, client: openai.OpenAI) -> None:
    def thought(text: str) -> Any:
        return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}

    history = [
        {"role": "user", "content": "1"},
        thought("old"),
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        thought("new"),
        {"role": "assistant", "content": "4"},
    ]
    agent.reset("a", "b")
    client.responses.create(model="default", input=history, reasoning={"context": "current_turn"})
    client.responses.create(model="default", input=history, reasoning={"context": "all_turns"})
    assert ["old" in prompt for prompt in agent.prompts] == [False, True]
    assert all("new" in prompt for prompt in agent.prompts)


def test_input_tokens(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("Hello")
    counted = client.responses.input_tokens.count(model="default", input="Hi", tools=TOOLS)
    response = client.responses.create(model="default", input="Hi", tools=TOOLS)
    assert counted.input_tokens == response.usage.input_tokens


def test_quiet_streams_repeat_in_progress(agent: AgentServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUIET_S", 0.01)
    agent.engine.on_submit = None
    with agent.server.http.stream("POST", "/v1/responses", json={"input": "Go", "stream": True}) as response:
        num_seen = 0
        for line in response.iter_lines():
            num_seen += line == "event: response.in_progress"
            if num_seen == 3:
                break
    assert num_seen == 3
