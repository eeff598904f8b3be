"""Clients that leave, schedulers that restart, refusals and rubbish on the socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import httpx
import msgspec
import openai
import pytest

from frontend.errors import response_of
from shared.config import Settings
from shared.errors import EngineFailure, PoisonRequest
from shared.messages import Cancel, Heartbeat, Hello, Rejected, SayHello, Submit
from tests.frontend.conftest import EOS, RunningServer, ids
from tests.support.fake_engine import FakeEngine, says

HELLO = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "default", "messages": HELLO}


def text_of(stream: openai.Stream[openai.types.chat.ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def rejects(code: str, retry_after_s: float | None = None) -> Callable[[FakeEngine, Submit], None]:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        engine.send(
            Rejected(request_id=submit.request_id, code=code, message="refused", retry_after_s=retry_after_s),
        )

    return answer


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_retry_after(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.on_submit = rejects("rate_limit_exceeded", 3.2)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(messages=HELLO, model="default", stream=stream)
    assert caught.value.response.headers["retry-after"] == "4"
    assert caught.value.code == "rate_limit_exceeded"


def test_no_target_is_503_and_health_follows_it(server: RunningServer, engine: FakeEngine) -> None:
    engine.set_target("loading")
    health = server.wait_status("/health", 503)
    assert health.json()["target"] == "loading"
    response = server.http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    engine.set_target("ready")
    assert server.wait_status("/health", 200).json()["target"] == "ready"


def test_before_any_scheduler_all_is_503_and_a_late_one_is_found(
    settings: Settings, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server()
    assert server.http.get("/health").status_code == 503
    assert server.http.post("/v1/chat/completions", json=CHAT).status_code == 503
    assert "http_requests_total" in server.http.get("/metrics").text
    with FakeEngine(settings.engine_endpoint) as engine:
        server.wait_status("/health", 200)
        assert engine.wait_for(Hello)[0].role == "frontend"


def test_an_engine_error_in_a_stream_is_an_error_event_then_done(server: RunningServer, engine: FakeEngine) -> None:
    def fail(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("ab"))
        engine.send_output(submit.request_id, [], finish_reason="error", error="row went bad")

    engine.on_submit = fail
    response = server.http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["message"] == "row went bad"
    whole = server.http.post("/v1/chat/completions", json=CHAT)
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "engine_failure"


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_client_that_leaves_cancels_its_sequences(
    server: RunningServer, engine: FakeEngine, stream: bool, has_begun: bool
) -> None:
    """Queued (nothing sent yet) or running, streaming or not."""
    if has_begun:
        engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids("a"))
    with httpx.Client(base_url=server.url, timeout=20) as http:
        body = CHAT | {"stream": stream, "n": 2}
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=body, timeout=0.3)
    submits = engine.wait_for(Submit, count=2)
    cancels = engine.wait_for(Cancel, count=2)
    assert {c.request_id for c in cancels} == {s.request_id for s in submits}
    assert {c.reason for c in cancels} == {"client_gone"}
    assert server.engine_client.num_live == 0


def test_one_failed_sequence_ends_its_siblings(server: RunningServer, engine: FakeEngine) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        if submit.request_id.endswith("-1"):
            engine.send_output(submit.request_id, [], finish_reason="error", error="bad row")

    engine.on_submit = answer
    assert server.http.post("/v1/chat/completions", json=CHAT | {"n": 2}).status_code == 500
    assert engine.wait_for(Cancel)[0].request_id.endswith("-0")


# ---------------------------------------------------------------- scheduler restarts


def test_a_restarted_scheduler_gets_the_tokens_so_far_and_the_stream_goes_on(
    server: RunningServer, client: openai.OpenAI, engine: FakeEngine
) -> None:
    whole = [*ids("Hello, wörld 👍 again"), EOS]
    cut = len(ids("Hello, w")) + 1  # inside the ö
    engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, whole[:cut])
    stream = client.chat.completions.create(messages=HELLO, model="default", stream=True, seed=5)
    chunks = iter(stream)
    shown = "".join(next(chunks).choices[0].delta.content or "" for _ in range(2))
    assert shown == "Hello, w"
    first = engine.wait_for(Submit)[0]
    engine.on_submit = says(whole)
    engine.forget_received()
    engine.restart()
    shown += "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert shown == "Hello, wörld 👍 again"
    again = engine.wait_for(Submit)[0]
    assert again == msgspec.structs.replace(first, output_token_ids=whole[:cut], is_resumed=True)
    assert len([m for m in engine.received if isinstance(m, Submit)]) == 1


def test_a_scheduler_that_forgot_us_gets_the_live_requests_again(
    server: RunningServer, client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids("ab"))
    stream = client.chat.completions.create(messages=HELLO, model="default", stream=True)
    chunks = iter(stream)
    assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "ab"]
    engine.on_submit = says([*ids("abcd"), EOS])
    engine.send(SayHello())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "cd"
    assert engine.wait_for(Submit, count=2)[1].output_token_ids == ids("ab")


def test_a_client_that_leaves_while_the_scheduler_is_away_is_not_resubmitted(
    server: RunningServer, engine: FakeEngine
) -> None:
    with (
        httpx.Client(base_url=server.url, timeout=20) as http,
        http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response,
    ):
        next(response.iter_lines())
        engine.stop()
    engine.forget_received()
    while server.engine_client.num_live:
        threading.Event().wait(0.01)
    engine.start()
    server.wait_status("/health", 200)
    engine.wait_for(Heartbeat)
    assert not [m for m in engine.received if isinstance(m, Submit)]


def test_a_scheduler_that_stays_away_ends_live_requests_with_a_clear_error(
    settings: Settings, engine: FakeEngine, start_server: Callable[..., RunningServer]
) -> None:
    quick = msgspec.structs.replace(settings, heartbeat_timeout_s=0.4)
    server = start_server(settings=quick, lost_limit_s=0.4)
    server.wait_status("/health", 200)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.http.post("/v1/chat/completions", json=CHAT)))
    asking.start()
    engine.wait_for(Submit)
    engine.stop()
    asking.join(10)
    assert answers[0].status_code == 503
    assert "did not come back" in answers[0].json()["error"]["message"]
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/health").json()["scheduler"] == "silent"


# ---------------------------------------------------------------- rubbish


def test_random_truncated_and_stale_frames_are_counted_and_dropped(
    server: RunningServer, client: openai.OpenAI, engine: FakeEngine
) -> None:
    rubbish = [b"", b"\x00\xff" * 50, b"\x81\xa4type\xa6Submit", b"\xc1", b"\x81" * 2000, b"text"]
    for frame in rubbish:
        engine.send_raw(frame)
    engine.send_raw(b"two", b"frames")
    stale = msgspec.structs.replace(engine._status(), scheduler_id="an older one", target="absent")
    engine.send(stale)
    engine.on_submit = says([*ids("fine"), EOS])
    answer = client.chat.completions.create(messages=HELLO, model="default")
    assert answer.choices[0].message.content == "fine"
    assert server.engine_client.num_dropped_messages == len(rubbish) + 2
    beat = engine.wait_for(Heartbeat, lambda beat: beat.num_dropped_messages == len(rubbish) + 2)
    assert beat
    assert f"tandem:frontend_dropped_messages {len(rubbish) + 2}.0" in server.http.get("/metrics").text


def test_stopping_ends_live_requests_and_frees_the_engine(server: RunningServer, engine: FakeEngine) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.http.post("/v1/chat/completions", json=CHAT)))
    asking.start()
    engine.wait_for(Submit)
    server.server.should_exit = True
    asking.join(10)
    server.thread.join(4)
    assert not server.thread.is_alive()
    assert answers[0].status_code == 503
    assert engine.wait_for(Cancel)[0].reason == "shutdown"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_clients_are_told_not_to_send_a_poison_request_again(path: str) -> None:
    """Their libraries repeat a 500 twice, and each time would take two processes with it."""
    scope = {"type": "http", "path": path, "request_id": b"r"}
    assert response_of(PoisonRequest("given up"), scope).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in response_of(EngineFailure("another"), scope).headers
