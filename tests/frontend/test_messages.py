"""Anthropic's Messages API, through the anthropic SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from shared.messages import Cancel, Submit
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.conftest import EOS, ids
from tests.frontend.tool_outputs import OUTPUTS, READ, SCHEMAS

TOOLS: list[Any] = [{"name": name, "description": "d", "input_schema": schema} for name, schema in SCHEMAS.items()]
ASK: dict[str, Any] = {"model": "default", "max_tokens": 2000, "messages": [{"role": "user", "content": "Go"}]}
EPHEMERAL = {"type": "ephemeral"}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with running(tmp_path_factory.mktemp("run"), tool_parser="hermes", reasoning_parser="think") as agent:
        yield agent


@pytest.fixture
def client(agent: AgentServer) -> Iterator[anthropic.Anthropic]:
    with agent.anthropic() as sdk:
        yield sdk


def raw_events(agent: AgentServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = agent.server.http.post("/v1/messages", json=body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + events[-1]["type"]
    return events


# ---------------------------------------------------------------- answers


def test_text_answer(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset("Hello")
    response = client.messages.with_raw_response.create(**ASK, system="Be brief", metadata={"user_id": "u"})
    message = response.parse()
    assert [block.model_dump() for block in message.content] == [{"type": "text", "text": "Hello", "citations": None}]
    assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
    assert message.usage.output_tokens == len("Hello") + 1
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert agent.prompts[0].startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nGo<|im_end|>")


def test_thinking_text_and_calls_are_blocks(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset("<think>hm</think>" + OUTPUTS["hermes"])
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    message = client.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "auto"}, thinking=thinking)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thought, text, first, second = message.content
    assert (thought.thinking, text.text) == ("hm", "Hi")
    assert (first.name, first.input, second.input) == ("read", READ, {})
    assert thought.signature
    assert message.stop_reason == "tool_use"


def test_stream_has_every_event_in_order(agent: AgentServer) -> None:
    agent.reset("<think>hm</think>" + OUTPUTS["hermes"])
    events = raw_events(agent, ASK | {"tools": TOOLS, "thinking": {"type": "adaptive"}})
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    starts = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    deltas = [(e["index"], e["delta"]["type"]) for e in events if e["type"] == "content_block_delta"]
    assert deltas[0] == (0, "thinking_delta")
    assert (0, "signature_delta") in deltas
    assert deltas.count((2, "input_json_delta")) > 3
    assert deltas == sorted(deltas, key=lambda d: d[0])
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 0


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_stream_helper_builds_the_same_message(agent: AgentServer, client: anthropic.Anthropic, chunk: int) -> None:
    agent.reset("<think>hm</think>" + OUTPUTS["hermes"], chunk=chunk)
    with client.messages.stream(**ASK, tools=TOOLS, thinking={"type": "adaptive"}) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "Hi"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[2].input == READ
    assert message.content[0].signature
    assert message.stop_reason == "tool_use"


def test_async_client(agent: AgentServer) -> None:
    async def ask() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=agent.server.url, api_key="none", max_retries=0) as sdk:
            whole = await sdk.messages.create(**ASK)
            async with sdk.messages.stream(**ASK) as stream:
                streamed = await stream.get_final_text()
        return whole.content[0].text, streamed

    agent.reset("one", "two")
    assert asyncio.run(ask()) == ("one", "two")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_really_stops_and_is_reported(
    agent: AgentServer, client: anthropic.Anthropic, stream: bool
) -> None:
    agent.reset()
    agent.engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids("one END two"))
    if stream:
        with client.messages.stream(**ASK, stop_sequences=["END", "no"]) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**ASK, stop_sequences=["END", "no"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    assert message.content[0].text == "one "
    assert agent.engine.wait_for(Cancel)[0].reason == "stop_string"


def test_max_tokens_and_a_full_context_are_told_apart(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset("a long answer", "x")
    message = client.messages.create(**ASK | {"max_tokens": 4})
    assert (message.stop_reason, message.content[0].text) == ("max_tokens", "a lo")
    agent.engine.on_submit = lambda engine, submit: engine.send_output(
        submit.request_id, ids("x"), finish_reason="length"
    )
    with client.messages.stream(**ASK | {"max_tokens": 500_000}) as stream:
        assert stream.get_final_message().stop_reason == "model_context_window_exceeded"
    submit = agent.engine.wait_for(Submit, count=2)[1]
    assert submit.max_tokens == 200_000 - len(submit.prompt_token_ids)


def test_sampling_fields_reach_the_engine(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset("x")
    client.messages.create(**ASK, extra_body={"temperature": 0.5, "top_p": 0.8, "top_k": 7})
    sampling = agent.engine.wait_for(Submit)[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.8, 7)


def test_cached_tokens_are_not_input_tokens(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset()
    agent.engine.on_submit = lambda engine, submit: engine.send_output(
        submit.request_id, [EOS], finish_reason="stop", num_cached_tokens=8
    )
    count = client.messages.count_tokens(model="default", messages=ASK["messages"]).input_tokens
    usage = client.messages.create(**ASK).usage
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (8, 0)
    assert usage.input_tokens == count - 8
    with client.messages.stream(**ASK) as stream:
        assert stream.get_final_message().usage.input_tokens == count - 8


@pytest.mark.parametrize("stream", [False, True])
def test_disable_parallel_tool_use_ends_after_the_first_call(
    agent: AgentServer, client: anthropic.Anthropic, stream: bool
) -> None:
    agent.reset()
    agent.engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids(OUTPUTS["hermes"]))
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    if stream:
        with client.messages.stream(**ASK, **options) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**ASK, **options)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.stop_reason == "tool_use"
    assert agent.engine.wait_for(Cancel)[0].reason == "stop_string"


def test_a_call_that_is_cut_off_is_text(agent: AgentServer, client: anthropic.Anthropic) -> None:
    text = '<tool_call>{"name": "read", "arguments": {"path": "x'
    agent.reset(text, text)
    message = client.messages.create(**ASK, tools=TOOLS)
    assert ([block.type for block in message.content], message.stop_reason) == (["text"], "end_turn")
    with client.messages.stream(**ASK, tools=TOOLS) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["tool_use", "text"]
    assert streamed.content[1].text == message.content[0].text == text
    assert streamed.stop_reason == "end_turn"


def test_thinking_that_is_not_to_be_displayed_keeps_its_signature(agent: AgentServer) -> None:
    agent.reset("<think>hm</think>Yes", "<think>hm</think>Yes")
    body = ASK | {"thinking": {"type": "adaptive", "display": "omitted"}}
    block = agent.server.http.post("/v1/messages", json=body).json()["content"][0]
    assert block["thinking"] == ""
    deltas = [e["delta"] for e in raw_events(agent, body) if e["type"] == "content_block_delta"]
    assert deltas[0] == {"type": "signature_delta", "signature": block["signature"]}


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("thinking", "is_off"), [(None, True), ({"type": "disabled"}, True), ({"type": "adaptive"}, False)]
)
def test_thinking_reaches_the_template(agent: AgentServer, thinking: dict[str, Any] | None, is_off: bool) -> None:
    agent.reset("x")
    agent.server.http.post("/v1/messages", json=ASK | {"thinking": thinking}).raise_for_status()
    assert agent.prompts[0].endswith("</think>\n\n") == is_off


def test_effort_reaches_the_template(agent: AgentServer) -> None:
    agent.reset("x")
    agent.server.http.post("/v1/messages", json=ASK | {"output_config": {"effort": "max"}}).raise_for_status()
    assert "(high)" in agent.prompts[0]


def test_history_blocks_are_rendered(agent: AgentServer, client: anthropic.Anthropic) -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Go", "cache_control": EPHEMERAL}, document]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Look"},
                {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "x"}},
                {"type": "tool_use", "id": "t2", "name": "stop", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "found"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "text", "text": "On"},
            ],
        },
    ]
    agent.reset("x")
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
        {"type": "text", "text": "A", "cache_control": EPHEMERAL},
        {"type": "text", "text": "B"},
    ]
    client.messages.create(**ASK | {"messages": messages}, system=system)
    assert agent.prompts[0].startswith(
        "<|im_start|>system\nA\n\nB<|im_end|>\n"
        "<|im_start|>user\nGo\n<document>\nTitle: T\nD\n</document><|im_end|>\n"
        '<|im_start|>assistant\n<think>hm</think>Look[call read {"path": "x"}][call stop {}]<|im_end|>\n'
        "<|im_start|>tool\nfound<|im_end|>\n<|im_start|>tool\nError: no<|im_end|>\n<|im_start|>user\nOn<|im_end|>\n"
    )


def test_tool_choice_none_hides_tools(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset("x")
    client.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "none"})
    assert "<tools>" not in agent.prompts[0]


# ---------------------------------------------------------------- errors


def turn(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens: required"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"model": None}, "model: required"),
    ({"messages": []}, "messages"),
    ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "tool_choice.type: .*grammar"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "read"}}, "tool_choice"),
    ({"tools": [TOOLS[0] | {"strict": True}]}, "strict.*grammar"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools\\[0\\]"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"container": "x"}, "container: unknown"),
    ({"mcp_servers": []}, "mcp_servers: unknown"),
    ({"frobnicate": 1}, "frobnicate: unknown"),
    ({"service_tier": "batch"}, "service_tier"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "budget_tokens.*max_tokens"),
    ({"thinking": {"type": "often"}}, "thinking.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits"),
    ({"system": [IMAGE]}, "system"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    (turn(IMAGE), "messages\\[0\\].content\\[0\\].source.data: .*takes text only"),
    (turn({"type": "search_result"}), "search_result"),
    (turn({"type": "text", "text": "x", "colour": 1}), "colour"),
    (turn({"type": "tool_result", "tool_use_id": "t9", "content": "x"}), "t9"),
    (turn({"type": "tool_use", "id": "a", "name": "b", "input": {}}), "may not stand"),
    (turn({"type": "document", "source": {"type": "text"}}), "source.data"),
    (turn({"type": "document", "source": {"type": "url", "url": "x"}}), "source"),
    (turn({"type": "text", "text": "{"}, role="assistant"), "prefilled"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages\\[0\\].role"),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_what_is_wrong_or_not_supported_is_named(
    agent: AgentServer, client: anthropic.Anthropic, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        client.post("/v1/messages", body=ASK | fields, cast_to=object)
    body: Any = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["request_id"] == caught.value.response.headers["request-id"]


def test_error_types(agent: AgentServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**ASK | {"model": "claude-9"})
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]  # the SDK says object
    assert agent.server.http.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: 2.* tokens > "):
        client.messages.create(**ASK | {"messages": [{"role": "user", "content": "x" * 200_001}]})


def test_engine_errors_have_anthropics_shapes(agent: AgentServer, client: anthropic.Anthropic) -> None:
    agent.reset()

    def fail(engine: Any, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("ab"))
        engine.send_output(submit.request_id, [], finish_reason="error", error="it broke")

    agent.engine.on_submit = fail
    with pytest.raises(anthropic.InternalServerError) as whole:
        client.messages.create(**ASK)
    assert whole.value.body["error"] == {"type": "api_error", "message": "it broke"}  # type: ignore[index]  # object
    last = raw_events(agent, ASK)[-1]
    assert (last["type"], last["error"]["message"]) == ("error", "it broke")
    with pytest.raises(anthropic.APIStatusError, match="it broke"), client.messages.stream(**ASK) as stream:
        stream.get_final_message()


def test_keys_as_x_api_key_or_bearer(tmp_path: Any) -> None:
    with running(tmp_path, api_keys="sesame") as agent:
        agent.reset("a", "b")
        with agent.anthropic(api_key="sesame") as client:
            assert client.messages.create(**ASK).content[0].text == "a"
        with agent.anthropic(api_key=None, auth_token="sesame") as client:
            assert client.messages.create(**ASK).content[0].text == "b"
        with agent.anthropic(api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(**ASK)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]  # object
        assert caught.value.response.headers["request-id"]


def test_no_target_is_overloaded(agent: AgentServer) -> None:
    agent.engine.set_target("loading")
    try:
        agent.server.wait_status("/health", 503)
        response = agent.server.http.post("/v1/messages", json=ASK)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    finally:
        agent.engine.set_target("ready")
        agent.server.wait_status("/health", 200)
