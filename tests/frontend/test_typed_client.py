"""`tandem.Client` and `tandem.AsyncClient` against a real HTTP server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import msgspec
import pytest

from shared.config import Settings
from shared.errors import Busy, EngineFailure, Forbidden, InvalidRequest, NotFound, Unavailable
from shared.messages import CacheReply, CacheRequest, Cancel, Rejected, Submit, TokenLogprob, TopLogprob
from tandem import AsyncClient, Client
from tests.frontend.conftest import EOS, RunningServer, byte_text, ids
from tests.support.fake_engine import FakeEngine, says

CHAT = [{"role": "user", "content": "Hi"}]
CALL = '<think>So</think>Well.<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url, timeout_s=20) as made:
        yield made


def test_an_answer_has_text_counts_and_times(client: Client, engine: FakeEngine) -> None:
    engine.on_submit = says([*ids("Hello wörld"), EOS])
    answer = client.chat(CHAT, temperature=0.5, seed=3, logit_bias={65: 1.0}, stop=("x", "y"))
    submit = engine.wait_for(Submit)[0]
    assert (submit.sampling.temperature, submit.sampling.seed, submit.sampling.logit_bias) == (0.5, 3, {65: 1.0})
    assert (answer.text, answer.finish_reason, answer.model) == ("Hello wörld", "stop", "Fake-1B")
    assert answer.stats.num_prompt_tokens == len(submit.prompt_token_ids)
    assert answer.stats.num_output_tokens == len(ids("Hello wörld")) + 1
    assert (answer.stats.num_draft_tokens, answer.stats.num_accepted_tokens) == (4, 3)
    assert answer.stats.decode_s == pytest.approx(0.02)


def test_chunks_make_the_answer(client: Client, engine: FakeEngine) -> None:
    engine.on_submit = says([*ids("Hello wörld"), EOS])
    with client.stream(CHAT) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.answer.text == "Hello wörld"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert chunks[-1].stats is not None and chunks[-1].stats.num_accepted_tokens == 3
    assert stream.answer.stats.num_output_tokens == len(ids("Hello wörld")) + 1
    whole = client.chat(CHAT)
    assert (stream.answer.text, stream.answer.model) == (whole.text, whole.model)


def test_reasoning_and_calls_are_told_apart(
    engine: FakeEngine, settings: Settings, start_server: Callable[..., RunningServer]
) -> None:
    template = "{{ tools }}" + (byte_text().chat_template or "")
    chosen = msgspec.structs.replace(settings, tool_parser="hermes", reasoning_parser="think")
    running = start_server(byte_text(chat_template=template), settings=chosen)
    running.wait_status("/health", 200)
    engine.on_submit = says([*ids(CALL), EOS])
    with Client(running.url) as client:
        whole = client.chat(CHAT, tools=TOOLS)
        with client.stream(CHAT, tools=TOOLS) as stream:
            assert [chunk.finish_reason for chunk in stream][-1] == "tool_calls"
    for answer in (whole, stream.answer):
        assert (answer.reasoning, answer.text, answer.finish_reason) == ("So", "Well.", "tool_calls")
        assert [(call.name, call.parsed()) for call in answer.tool_calls] == [("look", {"at": "it"})]


def test_a_plain_completion_and_its_logprobs(client: Client, engine: FakeEngine) -> None:
    top = [TokenLogprob(logprob=-0.5, top=[TopLogprob(token_id=ids("A")[0], logprob=-0.5)])]

    def answer(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("A"), logprobs=top, finish_reason="length")

    engine.on_submit = answer
    entry = {"token": "A", "logprob": -0.5, "top_logprobs": [{"token": "A", "logprob": -0.5}]}
    assert client.complete("text", logprobs=True, top_logprobs=1).logprobs == [entry]
    with client.stream_complete([5, 6], logprobs=True, top_logprobs=1) as stream:
        assert [chunk.text for chunk in stream] == ["A", ""]
    assert stream.answer.logprobs == [entry]
    assert engine.wait_for(Submit, count=2)[1].prompt_token_ids == [5, 6]


def test_leaving_a_stream_stops_the_engine(client: Client, engine: FakeEngine) -> None:
    engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids("so "))
    with client.stream(CHAT) as stream:
        assert next(stream).text == "so "
    assert engine.wait_for(Cancel)[0].reason == "client_gone"
    assert (stream.answer.text, stream.answer.finish_reason) == ("so ", None)
    assert list(stream) == []


def test_errors_are_those_of_the_server(client: Client, engine: FakeEngine, server: RunningServer) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.chat(CHAT, temperature=7.0)
    assert refused.value.param == "temperature"
    with pytest.raises(InvalidRequest, match="nonsense"), client.stream(CHAT, nonsense=1):  # type: ignore[call-arg]
        pass
    with pytest.raises(NotFound):
        client.chat(CHAT, model="other")  # type: ignore[call-arg]
    engine.on_submit = lambda engine, submit: engine.send(
        Rejected(request_id=submit.request_id, code="rate_limit_exceeded", message="full", retry_after_s=3.0)
    )
    with pytest.raises(Busy, match="full") as busy:
        client.chat(CHAT)
    assert busy.value.retry_after_s == 3.0

    def fail(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("so "))
        engine.send_output(submit.request_id, [], finish_reason="error", error="it broke")

    engine.on_submit = fail
    with pytest.raises(EngineFailure, match="it broke"), client.stream(CHAT) as stream:
        list(stream)
    assert stream.answer.text == "so "


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with Client(url) as client:
            with pytest.raises(Unavailable, match="tandem serve"):
                client.health()
            with pytest.raises(Unavailable, match="tandem serve"):
                client.stream(CHAT)
            with pytest.raises(Unavailable, match="no server runs"):
                client.restart("target")
            with pytest.raises(InvalidRequest, match="none of"):
                client.restart("frontend")
    with Client("http://10.1.2.3:8080") as far, pytest.raises(Unavailable, match="own machine"):
        far.restart("target")


@contextmanager
def breaks_off(headers: bytes) -> Iterator[str]:
    """The address of a server that answers one request with an error whose body cannot be read."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(20)

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 500 Broken\r\n" + headers + b"\r\n\r\n" + b"0123456789")

        thread = Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(20)


@pytest.mark.parametrize("headers", [b"Content-Length: 100", b"Content-Encoding: gzip\r\nContent-Length: 10"])
def test_a_stream_whose_error_cannot_be_read_is_closed(headers: bytes) -> None:
    """Ten bytes of a hundred, and ten that are not gzip. The error is held, as by a log, and keeps nothing open."""
    seen: list[httpx.Response] = []

    async def keep(response: httpx.Response) -> None:
        seen.append(response)

    async def use(url: str) -> None:
        async with AsyncClient(url, timeout_s=20) as client:
            client._http.event_hooks = {"response": [keep]}
            with pytest.raises(Unavailable, match="failed") as held:
                await client.stream(CHAT).__aenter__()
            assert seen[1].is_closed and held.value.__traceback__

    with breaks_off(headers) as url, Client(url, timeout_s=20) as client:
        client._http.event_hooks = {"response": [seen.append]}
        with pytest.raises(Unavailable, match="failed") as held:
            client.stream(CHAT)
        assert seen[0].is_closed and held.value.__traceback__  # not by the end of the last reference
    with breaks_off(headers) as url:
        asyncio.run(use(url))


def test_the_address_follows_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_PORT", "8123")
    with Client() as own, Client("http://host:1/v1/") as other:
        assert (own.url, other.url) == ("http://127.0.0.1:8123", "http://host:1")


def test_state_of_the_server(client: Client, engine: FakeEngine, server: RunningServer) -> None:
    engine.cache_reply = CacheReply(
        query_id=0, enabled=True, block_size=32, blocks={"device": 3}, tier_bytes={"device": 300}, query_tokens=8,
        hit_tokens=2, cleared_blocks=5,
    )  # fmt: skip
    assert client.cache().tiers["device"].bytes == 300 and client.cache().hit_rate == 0.25
    assert client.clear_cache().cleared_blocks == 5
    assert [request.clear for request in engine.wait_for(CacheRequest, count=3)] == [False, False, True]
    assert [(card.id, card.max_model_len) for card in client.models()] == [("Fake-1B", 2048)]
    assert client.health().is_ready and client.health().target == "ready"
    assert "vllm:x 1.0" in client.metrics()
    engine.set_target("loading")
    server.wait_status("/health", 503)
    assert client.health().target == "loading"


def test_a_key_is_sent(engine: FakeEngine, settings: Settings, start_server: Callable[..., RunningServer]) -> None:
    running = start_server(settings=msgspec.structs.replace(settings, api_keys="secret", admin_key="boss"))
    running.wait_status("/health", 200)
    engine.cache_reply = CacheReply(query_id=0, enabled=False)
    with Client(running.url) as nobody, pytest.raises(Forbidden):
        nobody.models()
    with Client(running.url, api_key="secret") as user:
        assert user.models()
        with pytest.raises(Forbidden, match="admin key"):
            user.clear_cache()
    with Client(running.url, api_key="boss") as admin:
        assert not admin.clear_cache().enabled


def test_media_are_sent_with_the_request(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\].*text only"):
        client.chat(CHAT, images=[tmp_path / "a.png"])
    with pytest.raises(InvalidRequest, match=r"images\[0\].*No such file"):
        client.chat(CHAT, images=tmp_path / "b.png")
    with pytest.raises(InvalidRequest, match="need a user message"):
        client.chat([{"role": "system", "content": "x"}], images=tmp_path / "a.png")


def test_the_asynchronous_client_gives_the_same(server: RunningServer, client: Client, engine: FakeEngine) -> None:
    engine.on_submit = says([*ids("Hello"), EOS])
    engine.cache_reply = CacheReply(query_id=0, enabled=False)

    async def use() -> list[Any]:
        async with AsyncClient(server.url) as made:
            first, second = await asyncio.gather(made.chat(CHAT), made.complete("x"))
            async with made.stream(CHAT) as stream:
                texts = [chunk.text async for chunk in stream]
            assert "".join(texts) == stream.answer.text == first.text == second.text == "Hello"
            with pytest.raises(InvalidRequest, match="temperature"):
                await made.chat(CHAT, temperature=7.0)
            with pytest.raises(InvalidRequest, match="temperature"):
                async with made.stream_complete("x", temperature=7.0):
                    pass
            assert "vllm:x" in await made.metrics()
            assert not (await made.clear_cache()).enabled
            return [await made.models(), await made.cache(), (await made.health()).status]

    assert asyncio.run(use()) == [client.models(), client.cache(), "ok"]
