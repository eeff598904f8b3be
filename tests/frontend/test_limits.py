"""Clients that send too much, too often, too slowly, or do not read: each gets its own status."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from frontend import connection, streams
from frontend.json_depth import MAX_DEPTH
from frontend.limits import Limits
from shared.api_keys import load_keys
from shared.config import Settings
from shared.errors import BadConfig, Busy
from shared.messages import CacheReply, Cancel, Submit
from tests.frontend.conftest import RunningServer, ids
from tests.support.fake_engine import FakeEngine, says

PATH = "/v1/completions"
BODY = {"model": "default", "prompt": "x", "max_tokens": 4}
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
Start = Callable[..., RunningServer]


@pytest.fixture
def start(engine: FakeEngine, start_server: Start, settings: Settings) -> Start:
    """A ready server with these settings."""

    def begin(**changes: object) -> RunningServer:
        server = start_server(settings=msgspec.structs.replace(settings, **changes))
        server.wait_status("/health", 200)
        return server

    engine.on_submit = says(ids("abcd"))
    return begin


def error(response: httpx.Response) -> dict[str, object]:
    found: dict[str, object] = response.json()["error"]
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    event = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        event.wait(0.02)
    raise AssertionError("not within its time")


def raw(server: RunningServer, data: bytes, timeout_s: float = 20.0) -> bytes:
    """All that the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as connected:
        connected.sendall(data)
        answer = b""
        while part := connected.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_large_body_is_413(start: Start, is_announced: bool) -> None:
    server = start(max_body_bytes=2000)
    large = b'{"model": "default", "prompt": "' + b"x" * 2000 + b'"}'
    response = server.http.post(PATH, content=large if is_announced else iter([large[:1000], large[1000:]]))
    assert response.status_code == 413
    assert "2000 bytes" in str(error(response)["message"])
    assert server.http.post("/v1/messages", content=large).json()["error"]["type"] == "request_too_large"
    assert server.http.post(PATH, json=BODY).status_code == 200


def test_a_body_that_is_announced_as_large_is_refused_before_it_is_sent(start: Start) -> None:
    server = start()
    answer = raw(
        server, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 99999999999\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_408(start: Start) -> None:
    server = start(body_timeout_s=0.3)
    answer = raw(
        server, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 10\r\n\r\n{"
    )
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("opening", [b'{"a":', b"[", b'[{"b":['])
def test_json_nested_too_deep_is_400_and_as_deep_as_allowed_is_read(start: Start, opening: bytes) -> None:
    server = start()
    closing = opening.translate(bytes.maketrans(b"{[", b"}]"), b'":ab')[::-1]
    for depth in (MAX_DEPTH + 2, 300, 5000, 200_000):
        value = opening * depth + b"1" + closing * depth
        response = server.http.post(PATH, content=b'{"model": "default", "prompt": ' + value + b"}")
        assert response.status_code == 400, depth
    # Below the limit it is the field that is refused, not the depth.
    times = (MAX_DEPTH - 2) // (1 + opening.count(b"[") + opening.count(b"{"))
    value = opening * times + b"1" + closing * times
    response = server.http.post(PATH, content=b'{"model": "default", "prompt": ' + value + b"}")
    assert response.status_code == 400
    assert "nests" not in str(error(response)["message"])


def test_many_shallow_brackets_are_fine(start: Start) -> None:
    server = start()
    messages = [{"role": "user", "content": "{[" * 500}] * 100
    assert server.http.post("/v1/chat/completions", json={"model": "default", "messages": messages}).status_code != 500


LARGE = b"x: " + b"y" * connection.MAX_HEAD_BYTES + b"\r\n"
MANY = b"".join(b"x%d: y\r\n" % i for i in range(connection.MAX_HEADERS + 1))


@pytest.mark.parametrize("head", [LARGE, MANY], ids=["large", "many"])
def test_a_head_beyond_its_limits_is_431(start: Start, head: bytes) -> None:
    server = start()
    answer = raw(server, b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


def is_cut(connected: socket.socket) -> bool:
    """Whether the server closes without an answer."""
    connected.settimeout(20)
    try:
        return connected.recv(100) == b""
    except ConnectionError:
        return True


def test_a_head_without_end_is_cut_off(start: Start) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connected:
        connected.sendall(b"GET / HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            connected.sendall(b"y" * 50_000_000)
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("beginning", [b"", b"GET / HTTP/1.1\r\nhost"])
def test_a_head_that_comes_too_slowly_is_cut_off(
    beginning: bytes, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connected:
        connected.sendall(beginning)
        assert is_cut(connected)


def test_each_key_has_its_own_rate(start: Start) -> None:
    server = start(api_keys="alpha,beta", requests_per_minute_per_key=3)
    for _ in range(3):
        assert server.http.post(PATH, json=BODY, headers={"x-api-key": "alpha"}).status_code == 200
    refused = server.http.post(PATH, json=BODY, headers={"x-api-key": "alpha"})
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-request-id"]
    assert server.http.post(PATH, json=BODY, headers={"x-api-key": "beta"}).status_code == 200
    assert server.http.get("/v1/models", headers={"x-api-key": "alpha"}).status_code == 200


def test_the_bucket_fills_with_time() -> None:
    now = 100.0

    async def app(*_: object) -> None: ...

    limits = Limits(app, Settings(requests_per_minute_per_key=60), clock=lambda: now)

    def taken() -> int:
        for n in range(1000):
            try:
                limits._enter("t").num_active -= 1
            except Busy:
                return n
        raise AssertionError("no limit")

    assert taken() == 60
    assert taken() == 0
    now += 5.0
    assert taken() == 5
    now += 10_000
    assert taken() == 60


def test_each_key_has_its_own_number_of_requests_at_once(start: Start, engine: FakeEngine) -> None:
    server = start(api_keys="alpha,beta", max_requests_per_key=1)
    engine.on_submit = None
    headers = {"x-api-key": "alpha"}
    with server.http.stream("POST", PATH, json=BODY | {"stream": True}, headers=headers) as answer:
        (submit,) = engine.wait_for(Submit)
        assert answer.status_code == 200
        assert server.http.post(PATH, json=BODY, headers=headers).status_code == 429
        engine.on_submit = says(ids("abcd"))
        assert server.http.post(PATH, json=BODY, headers={"x-api-key": "beta"}).status_code == 200
        engine.send_output(submit.request_id, ids("a"), finish_reason="stop")
        answer.read()
    assert server.http.post(PATH, json=BODY, headers=headers).status_code == 200


def test_the_timeout_header_reaches_the_scheduler_and_its_error_is_504(start: Start, engine: FakeEngine) -> None:
    from shared.messages import Output, Outputs

    server = start()
    assert server.http.post(PATH, json=BODY, headers={"x-request-timeout": "2.5"}).status_code == 200
    assert engine.wait_for(Submit)[0].timeout_s == 2.5

    def expire(engine: FakeEngine, submit: Submit) -> None:
        last = Output(
            request_id=submit.request_id, token_ids=[], finish_reason="error", error="too late",
            error_code="deadline_exceeded",
        )  # fmt: skip
        engine.send(Outputs(outputs=[last]))

    engine.on_submit = expire
    response = server.http.post(PATH, json=BODY, headers={"x-request-timeout": "1"})
    assert response.status_code == 504
    assert error(response)["code"] == "deadline_exceeded"
    for wrong in ("0", "-1", "soon", "nan", "inf", "1e9", ""):
        response = server.http.post(PATH, json=BODY, headers={"x-request-timeout": wrong})
        assert response.status_code == 400
        assert error(response)["param"] == "x-request-timeout"


def test_a_client_that_does_not_read_is_cut_off_and_its_request_cancelled(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_UNREAD", 256)
    server = start()
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections hold little too
    engine.on_submit = None
    body = msgspec.json.encode(BODY | {"stream": True, "max_tokens": 2000, "logprobs": 5, "ignore_eos": True})
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(head % len(body) + body)
        (submit,) = engine.wait_for(Submit)
        full = threading.Event()

        def pour() -> None:
            # No faster than the server takes it: what it had to work off later would delay its end.
            while not full.wait(0.002) and not any(isinstance(m, Cancel) for m in engine.received):
                with contextlib.suppress(KeyError):  # cancelled since the engine was asked
                    engine.send_output(submit.request_id, ids("a" * 400))

        poured = threading.Thread(target=pour)
        poured.start()
        try:
            assert engine.wait_for(Cancel, timeout_s=60)[0].request_id == submit.request_id
        finally:
            full.set()
            poured.join(20)
    assert server.http.get("/health").json()["num_open_requests"] == 0


@pytest.mark.parametrize("num_requests", [1, 40])
def test_a_client_that_does_not_read_a_complete_answer_is_cut_off(start: Start, num_requests: int) -> None:
    """No engine writes on, so nothing else would notice: neither one large answer nor many small ones."""
    server = start(slow_reader_s=0.5)
    server.http.close()
    connections = server.server.server_state.connections
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    path = b"/openapi.json" if num_requests == 1 else b"/metrics"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall((b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path) * num_requests)
        wait_until(lambda: len(connections) > 0)
        wait_until(lambda: not connections)


def test_a_client_that_reads_slowly_gets_its_whole_answer(start: Start) -> None:
    server = start(slow_reader_s=0.5)
    expected = len(server.http.get("/openapi.json").content)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    received, pause = b"", threading.Event()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        for _ in range(20):  # longer than the limit in all
            received += slow.recv(2048)
            pause.wait(0.1)
        while part := slow.recv(65536):
            received += part
    assert len(received.partition(b"\r\n\r\n")[2]) == expected


def test_keys_come_from_a_private_file_too(tmp_path: Path, start: Start) -> None:
    file = tmp_path / "keys"
    file.write_text("# team\nfirst-key\nsecond-key 2.5\n\n")
    file.chmod(0o600)
    settings = Settings(api_keys="third", api_keys_file=str(file))
    assert [(k.key, k.weight) for k in load_keys(settings)] == [(b"third", 1), (b"first-key", 1), (b"second-key", 2.5)]
    assert "first-key" not in repr(load_keys(settings))
    server = start(api_keys_file=str(file))
    assert server.http.get("/v1/models").status_code == 401
    assert server.http.get("/v1/models", headers={"authorization": "Bearer second-key"}).status_code == 200
    assert server.http.get("/v1/models", headers={"authorization": "Bearer third"}).status_code == 401


@pytest.mark.parametrize(
    ("content", "mode"), [("secret-key-1", 0o644), ("abc", 0o600), ("secret-key-1 heavy", 0o600), ("a-key 1 2", 0o600),
                          ("a-key nan", 0o600), ("a-key 0", 0o600), ("# none", 0o600)],
)  # fmt: skip
def test_a_bad_key_file_stops_start_up_without_telling_its_content(content: str, mode: int, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(BadConfig) as refusal:
        load_keys(Settings(api_keys_file=str(file)))
    assert content.split()[0] not in refusal.value.message or content == "# none"


@pytest.mark.parametrize("api_keys", ["", "alpha"])
def test_what_changes_the_server_takes_the_admin_key_once_there_is_one(
    start: Start, engine: FakeEngine, api_keys: str
) -> None:
    engine.cache_reply = CacheReply(query_id=0, enabled=True, cleared_blocks=7)
    server = start(api_keys=api_keys, admin_key="root-key")
    for key in ("alpha", "root-kex", ""):
        refused = server.http.delete("/v1/cache", headers={"x-api-key": key})
        assert refused.status_code == 403
        assert error(refused)["type"] == "permission_error"
    assert server.http.delete("/v1/cache", headers={"authorization": "Bearer root-key"}).status_code == 200
    assert server.http.get("/v1/models", headers={"x-api-key": "root-key"}).status_code == 200
    assert server.http.get("/v1/models").status_code == (401 if api_keys else 200)


def test_the_admin_key_must_not_be_an_api_key() -> None:
    with pytest.raises(BadConfig, match="ADMIN_KEY"):
        load_keys(Settings(api_keys="alpha,root-key", admin_key="root-key"))


def test_neither_prompts_nor_keys_are_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="frontend")
    server = start(api_keys="top-secret-key")
    headers = {"x-api-key": "top-secret-key"}
    secret = BODY | {"prompt": "my medical history"}
    assert server.http.post(PATH, json=secret, headers=headers).status_code == 200
    assert server.http.post(PATH, json=secret | {"unknown": 1}, headers=headers).status_code == 400
    assert server.http.post(PATH, json=secret, headers={"x-api-key": "top-secret-kez"}).status_code == 401
    assert any(PATH in record.getMessage() for record in caplog.records)
    for private in ("medical", "top-secret"):
        assert private not in caplog.text
