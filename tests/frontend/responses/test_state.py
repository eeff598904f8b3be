"""What outlives a request: conversations, background responses, cancelling, pages of items."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shared.config import Settings
from shared.messages import Cancel, Submit
from tests.frontend.agent_server import TEMPLATE, AgentServer
from tests.frontend.conftest import EOS, RunningServer, byte_text, ids
from tests.support.fake_engine import FakeEngine, says, worker_info


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        run_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), heartbeat_interval_s=0.2, api_keys="one,two",
        tool_parser="hermes", reasoning_parser="think",
    )  # fmt: skip


@pytest.fixture
def engine(settings: Settings) -> Iterator[FakeEngine]:
    with FakeEngine(settings.engine_endpoint, info=worker_info(max_model_len=4000)) as running:
        yield running


def start(settings: Settings) -> RunningServer:
    server = RunningServer(settings, byte_text(chat_template=TEMPLATE))
    server.wait_status("/health", 200)
    return server


def test_a_conversation_goes_on_after_a_restart_and_is_nobody_elses(settings: Settings, engine: FakeEngine) -> None:
    server = start(settings)
    agent = AgentServer(engine, server)
    agent.reset("<think>Hm</think>My name is Ada", "Ada")
    with server.openai(api_key="one") as client:
        first = client.responses.create(model="default", input="Who are you?", instructions="Be brief.")
    server.close()
    files = list((Path(settings.cache_dir) / "responses").iterdir())
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}

    server = start(settings)
    try:
        with server.openai(api_key="one") as client:
            assert client.responses.retrieve(first.id).output_text == "My name is Ada"
            second = client.responses.create(model="default", input="Again?", previous_response_id=first.id)
        assert second.output_text == "Ada"
        assert (
            "user\nWho are you?<|im_end|>\n<|im_start|>assistant\n<think>Hm</think>My name is Ada" in agent.prompts[1]
        )
        assert "Be brief" not in agent.prompts[1]  # instructions are not carried over
        with server.openai(api_key="two") as other:
            for ask in (
                lambda: other.responses.retrieve(first.id),
                lambda: other.responses.delete(first.id),
                lambda: other.responses.cancel(first.id),
                lambda: list(other.responses.input_items.list(first.id)),
                lambda: other.responses.create(model="default", input="x", previous_response_id=first.id),
                lambda: other.responses.create(
                    model="default", input=[{"type": "item_reference", "id": first.output[0].id}]
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    ask()
        with server.openai(api_key="one") as client:
            client.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(first.id)
            with pytest.raises(openai.NotFoundError):  # its beginning is gone
                client.responses.create(model="default", input="x", previous_response_id=second.id)
    finally:
        server.close()


def test_a_background_response_that_a_restart_interrupts_has_failed(settings: Settings, engine: FakeEngine) -> None:
    server = start(settings)
    with server.openai(api_key="one") as client:
        begun = client.responses.create(model="default", input="Hi", background=True)
        assert begun.status in ("queued", "in_progress")
    server.close()
    server = start(settings)
    try:
        with server.openai(api_key="one") as client:
            response = client.responses.retrieve(begun.id)
        assert response.status == "failed"
        assert response.error.code in ("server_error", "server_is_overloaded")
    finally:
        server.close()


@pytest.fixture
def server(settings: Settings, engine: FakeEngine) -> Iterator[RunningServer]:
    running = start(settings)
    yield running
    running.close()


@pytest.fixture
def agent(server: RunningServer, engine: FakeEngine) -> AgentServer:
    return AgentServer(engine, server)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.openai(api_key="one") as sdk:
        yield sdk


def until_ended(client: openai.OpenAI, response_id: str) -> Any:
    """Poll as users of background responses do."""
    pause = threading.Event()
    for _ in range(500):
        response = client.responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response
        pause.wait(0.02)
    raise AssertionError(f"{response_id} does not end")


def test_background_is_polled(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.engine.on_submit = None
    begun = client.responses.create(model="default", input="Hi", background=True)
    assert begun.output == []
    assert client.responses.retrieve(begun.id).status in ("queued", "in_progress")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="default", input="x", previous_response_id=begun.id)
    assert caught.value.param == "previous_response_id"
    says([*ids("Hello"), EOS])(agent.engine, agent.engine.wait_for(Submit)[0])
    response = until_ended(client, begun.id)
    assert (response.status, response.output_text, response.background) == ("completed", "Hello", True)
    assert client.responses.cancel(begun.id).status == "completed"


def test_background_goes_on_without_its_client_and_streams_again_from_a_place(
    agent: AgentServer, server: RunningServer, client: openai.OpenAI
) -> None:
    agent.engine.on_submit = None
    head = {"authorization": "Bearer one"}
    body = {"input": "Hi", "background": True, "stream": True}
    with server.http.stream("POST", "/v1/responses", json=body, headers=head) as answer:
        first = next(line for line in answer.iter_lines() if line.startswith("data: "))
    created = json.loads(first[6:])
    assert created["type"] == "response.created"
    response_id = created["response"]["id"]
    submit = agent.engine.wait_for(Submit)[0]
    seen: list[Any] = []
    follower = threading.Thread(
        target=lambda: seen.extend(client.responses.retrieve(response_id, stream=True, starting_after=1))
    )
    follower.start()
    says([*ids("Hello there"), EOS], chunk=4)(agent.engine, submit)
    follower.join(20)
    assert not follower.is_alive()
    assert [event.sequence_number for event in seen] == list(range(2, 2 + len(seen)))
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == "Hello there"
    assert seen[-1].type == "response.completed"
    assert not [m for m in agent.engine.received if isinstance(m, Cancel)]
    late = list(client.responses.retrieve(response_id, stream=True, starting_after=seen[-2].sequence_number))
    assert [event.type for event in late] == ["response.completed"]


@pytest.mark.parametrize("options", [{"background": True}, {"stream": True}, {"background": True, "stream": True}])
def test_cancel_stops_the_engine(agent: AgentServer, client: openai.OpenAI, options: dict[str, Any]) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("Hello wor"))

    agent.engine.on_submit = answer
    made = client.responses.create(model="default", input="Hi", **options)
    stream = None
    if options.get("stream"):
        stream = iter(made)
        response_id = next(stream).response.id
        while next(stream).type != "response.output_text.delta":
            pass
    else:
        response_id = made.id
    cancelled = client.responses.cancel(response_id)
    assert cancelled.status == "cancelled"
    request_id = agent.engine.wait_for(Submit)[0].request_id
    assert agent.engine.wait_for(Cancel)[0].request_id == request_id
    if stream is not None:
        last = list(stream)[-1]
        assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert client.responses.retrieve(response_id).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_none")


def test_delete_stops_a_running_response(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.engine.on_submit = None
    begun = client.responses.create(model="default", input="Hi", background=True)
    client.responses.delete(begun.id)
    agent.engine.wait_for(Cancel)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)


def test_a_client_that_leaves_stops_its_response(agent: AgentServer, server: RunningServer) -> None:
    agent.engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids("Hello wor"))
    head = {"authorization": "Bearer one"}
    with server.http.stream("POST", "/v1/responses", json={"input": "Hi", "stream": True}, headers=head) as answer:
        next(answer.iter_lines())
    assert agent.engine.wait_for(Cancel)[0].reason == "client_gone"


def test_what_is_not_stored_is_not_there(agent: AgentServer, client: openai.OpenAI, settings: Settings) -> None:
    agent.reset("Hello")
    response = client.responses.create(model="default", input="Hi", store=False)
    assert not (Path(settings.cache_dir) / "responses").exists()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="default", input="Hi", store=False, background=True)


def test_input_items_come_in_pages(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("<think>Hm</think>One", "Two")
    first = client.responses.create(model="default", input=[{"role": "user", "content": str(i)} for i in range(5)])
    second = client.responses.create(model="default", input="more", previous_response_id=first.id)

    def texts(items: Any) -> list[str]:
        return [item.type if item.type != "message" else item.content[0].text for item in items]

    everything = ["0", "1", "2", "3", "4", "reasoning", "One", "more"]
    assert texts(client.responses.input_items.list(second.id, order="asc")) == everything
    assert texts(client.responses.input_items.list(second.id, limit=3)) == everything[::-1]  # all pages, newest first
    page = client.responses.input_items.list(second.id, order="asc", limit=3)
    assert (texts(page.data), page.has_more) == (everything[:3], True)
    rest = client.responses.input_items.list(second.id, order="asc", after=page.last_id)
    assert (texts(rest.data), rest.has_more) == (everything[3:], False)
    for options, param in (({"after": "msg_none"}, "after"), ({"limit": 0}, "limit"), ({"order": "up"}, "order")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.input_items.list(second.id, **options)  # type: ignore[arg-type]  # wrong on purpose
        assert caught.value.param == param


def test_an_item_reference_stands_for_its_item(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("Hello", "Again")
    first = client.responses.create(model="default", input="Hi")
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    bare: Any = {"id": first.output[0].id}
    client.responses.create(model="default", input=[reference, bare, {"role": "user", "content": "So?"}])
    assert "assistant\nHello\nHello<|im_end|>" in agent.prompts[1]


def test_compaction(agent: AgentServer, client: openai.OpenAI) -> None:
    history: list[Any] = [
        {"role": "user", "content": "Fix the bug"},
        {"type": "function_call", "call_id": "c", "name": "read", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "line 1"},
        {"role": "assistant", "content": "Fixed."},
        {"role": "user", "content": "Test it"},
    ]
    agent.reset("<think>Short!</think>The bug is fixed; tests remain.", "Tested.")
    compacted = client.responses.compact(model="default", input=history, instructions="You are an agent.")
    assert compacted.object == "response.compaction"
    assert [item.type for item in compacted.output] == ["message", "message", "compaction"]
    assert compacted.usage.output_tokens > 0
    assert "line 1" in agent.prompts[0]
    assert "bug is fixed" not in compacted.output[-1].encrypted_content
    again: list[Any] = [item.model_dump(exclude_none=True, warnings=False) for item in compacted.output]
    again[-1]["type"] = "compaction_summary"  # its former name
    response = client.responses.create(model="default", input=again)
    assert response.output_text == "Tested."
    assert "line 1" not in agent.prompts[1]
    for text in ("Fix the bug", "Test it", "The bug is fixed; tests remain."):
        assert text in agent.prompts[1]


def test_compaction_of_a_conversation_that_is_too_long(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("Summary")
    history: Any = [{"role": "user", "content": f"{i} " + "x" * 1000} for i in range(9)]
    compacted = client.responses.compact(model="default", input=history)
    assert len(compacted.output) == 10
    submit = agent.engine.wait_for(Submit)[0]
    assert len(submit.prompt_token_ids) + submit.max_tokens <= 4000
    assert "8 xxx" in agent.prompts[0]
    assert "0 xxx" not in agent.prompts[0]


def test_truncation(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("Hello")
    history: Any = [
        {"role": "user", "content": "a" * 1500},
        {"type": "function_call", "call_id": "c", "name": "read", "arguments": '{"path": "' + "p" * 1500 + '"}'},
        {"type": "function_call_output", "call_id": "c", "output": "b" * 100},
        {"role": "user", "content": "c" * 1200},
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="default", input=[*history, history[0]])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    response = client.responses.create(
        model="default", input=[*history, history[0]], truncation="auto", instructions="Rules", max_output_tokens=300
    )
    assert (response.output_text, response.truncation) == ("Hello", "auto")
    (prompt,) = agent.prompts
    assert prompt.startswith("<|im_start|>system\nRules")
    assert "bbb" not in prompt  # a result goes with its call
    assert "ccc" in prompt
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="default", input="x" * 5000, truncation="auto")
    assert caught.value.code == "context_length_exceeded"


def test_too_long_a_prompt_has_one_code_in_every_api(server: RunningServer) -> None:
    long = "x" * 5000
    chat = {"model": "default", "messages": [{"role": "user", "content": long}], "max_tokens": 5}
    head = {"authorization": "Bearer one"}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"prompt": long}),
        ("/v1/messages", chat),
        ("/v1/messages", chat | {"messages": [{"role": "user", "content": "x" * 2_000_000}]}),
        ("/v1/responses", {"input": long}),
        ("/v1/responses", {"input": long, "stream": True}),
        ("/v1/responses/input_tokens", {"input": "x" * 2_000_000}),
    ):
        response = server.http.post(path, json=body, headers=head)
        assert response.status_code == 400, path
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded", path
        if path == "/v1/messages":
            assert error["message"].startswith("prompt is too long")


def test_the_context_is_on_the_model_card(server: RunningServer, client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.model_dump()["context_window"] == card.model_dump()["max_model_len"] == 4000
    assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": "two"}).json()["data"][0]["max_tokens"] == 3999


def test_embeddings_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="default", input="x")
    assert caught.value.param == "model"
    assert "no embeddings" in caught.value.message


def test_a_store_that_cannot_be_written_is_a_503_and_requests_that_store_nothing_go_on(
    settings: Settings, engine: FakeEngine
) -> None:
    folder = Path(settings.cache_dir) / "responses"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the folder should be")
    server = start(settings)
    agent = AgentServer(engine, server)
    headers = {"authorization": "Bearer one"}
    for store, status in ((True, 503), (False, 200)):
        agent.reset("<think>Hm</think>Hello")
        body = {"model": "default", "input": "Hi", "store": store}
        answer = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=30)
        assert answer.status_code == status, answer.text
        if status == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert "store: false" in answer.json()["error"]["message"]
    server.close()
