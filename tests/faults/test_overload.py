"""More than fits, through the real processes: deadlines, keys that share, a queue that says when to come back, and
clients that leave or do not read.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.faults.load import Footprint
from tests.faults.test_kills import IS_LONG
from tests.support.server import Server
from tests.support.stream import BODY, IN_ENGINE

pytestmark = [pytest.mark.system, pytest.mark.mlx]

WAIT_S = 60.0
MAX_QUEUE = 8
PER_MINUTE = 120
SLOW_READER_S = 1.0
PATH = "/v1/completions"
KEYS = {name: f"{name}-key" for name in ("alpha", "beta", "gamma")}


class KeyedServer(Server):
    """A server with keys; its metrics are read with a key of their own."""

    def metric(self, name: str, **labels: str) -> float:
        total = 0.0
        page = httpx.get(f"{self.url}/metrics", headers=headers("beta"), timeout=10).text
        for line in page.splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def wait_in_engine(self, num_requests: int) -> None:
        self.wait_for(lambda: sum(map(self.metric, IN_ENGINE)) == num_requests, f"{num_requests} in the engine")


def headers(name: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}", **more}


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    """One slot; two keys in the environment, one in a file."""
    folder = tmp_path_factory.mktemp("overload")
    (folder / "keys").write_text(f"{KEYS['gamma']} 2\n")
    (folder / "keys").chmod(0o600)
    with KeyedServer(
        model, folder, max_num_seqs=1, max_queue=MAX_QUEUE, api_keys=f"{KEYS['alpha']},{KEYS['beta']}",
        api_keys_file=folder / "keys", requests_per_minute_per_key=PER_MINUTE, slow_reader_s=SLOW_READER_S,
        prefix_cache=False,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def server(shared: KeyedServer) -> Iterator[KeyedServer]:
    """Idle before and after."""
    shared.wait_in_engine(0)
    yield shared
    shared.wait_in_engine(0)
    assert shared.metric("vllm:kv_cache_usage_perc") == 0


class Asked(threading.Thread):
    """One completion; what came of it, and when."""

    def __init__(self, server: Server, name: str, *, timeout_s: float | None = None, **options: Any) -> None:
        super().__init__(daemon=True)
        self.server, self.body = server, {**BODY, "max_tokens": 60, **options}
        self.headers = headers(name, **({} if timeout_s is None else {"x-request-timeout": str(timeout_s)}))
        self.answer: httpx.Response | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        url = f"{self.server.url}{PATH}"
        self.answer = httpx.post(url, json=self.body, headers=self.headers, timeout=WAIT_S)
        self.ended = time.monotonic()

    def result(self) -> httpx.Response:
        self.join(WAIT_S)
        assert self.answer is not None, "no answer"
        return self.answer


def test_a_key_with_two_requests_waits_for_two_of_the_others_not_for_all(server: KeyedServer) -> None:
    target = server.worker("workers.target")
    target.suspend()
    try:
        many = []
        for i in range(6):
            many.append(Asked(server, "alpha"))
            server.wait_in_engine(i + 1)
        few = []
        for i in range(2):
            few.append(Asked(server, "beta"))
            server.wait_in_engine(7 + i)
    finally:
        target.resume()
    assert all(asked.result().status_code == 200 for asked in (*many, *few))
    order = sorted((*many, *few), key=lambda asked: asked.ended)
    # First come, first served would end them sixth and seventh. Our threads may wake late enough to swap two.
    assert order.index(few[0]) <= 3 and order.index(few[1]) <= 5
    assert order[-1] in many


@pytest.mark.parametrize("is_queued", [True, False])
def test_x_request_timeout_ends_a_request_that_waits_or_runs_with_504(server: KeyedServer, is_queued: bool) -> None:
    target = server.worker("workers.target")
    target.suspend()
    try:
        ahead = [Asked(server, "alpha")] if is_queued else []
        server.wait_in_engine(len(ahead))
        late = Asked(server, "beta", timeout_s=1.0)
        answer = late.result()
        assert answer.status_code == 504, answer.text
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        server.wait_in_engine(len(ahead))
    finally:
        target.resume()
    assert all(asked.result().status_code == 200 for asked in ahead)


def leave(server: KeyedServer) -> socket.socket:
    """A request on a connection of its own, which the test closes."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(request(BODY | {"stream": True}))
    return connection


def request(body: dict[str, Any]) -> bytes:
    content = msgspec.json.encode(body)
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS['alpha']}\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


def test_clients_that_leave_are_counted_by_what_their_request_was_doing(server: KeyedServer) -> None:
    def cancelled() -> list[float]:
        states = ("waiting", "prefilling", "decoding")
        return [server.metric("tandem:requests_cancelled_total", state=state) for state in states]

    before = cancelled()
    target = server.worker("workers.target")
    decoding = leave(server)
    while b"data: " not in decoding.recv(65536):
        continue
    target.suspend()
    try:
        with decoding:
            pass
        server.wait_for(lambda: cancelled()[2] == before[2] + 1, "one that decoded")
        prefilling = leave(server)
        server.wait_in_engine(1)
        waiting = leave(server)
        server.wait_in_engine(2)
        for connection in (waiting, prefilling):
            connection.close()
        server.wait_for(lambda: cancelled() == [n + 1 for n in before], "one of each")
    finally:
        target.resume()
    assert Asked(server, "alpha").result().status_code == 200


def test_a_full_queue_says_when_half_of_it_will_be_served(server: KeyedServer) -> None:
    paced = [Asked(server, "alpha", max_tokens=200) for _ in range(6)]
    ends = sorted(asked.ended for asked in paced if asked.result().status_code == 200)
    assert len(ends) == len(paced)
    interval_s = (ends[-1] - ends[0]) / (len(ends) - 1)
    target = server.worker("workers.target")
    target.suspend()
    try:
        accepted = []
        for i in range(1 + MAX_QUEUE):
            accepted.append(Asked(server, "alpha", max_tokens=200))
            server.wait_in_engine(i + 1)
        refused = Asked(server, "alpha").result()
        assert Asked(server, "beta").is_alive(), "another key still gets in"
        server.wait_in_engine(2 + MAX_QUEUE)
    finally:
        target.resume()
    resumed = time.monotonic()
    assert refused.status_code == 429
    retry_after_s = int(refused.headers["retry-after"])
    assert retry_after_s >= math.floor(interval_s * MAX_QUEUE / 4), (retry_after_s, interval_s)
    assert retry_after_s <= math.ceil(interval_s * MAX_QUEUE * 2) + 1, (retry_after_s, interval_s)
    threading.Event().wait(retry_after_s - (time.monotonic() - resumed))  # as a client that does what it is told
    assert Asked(server, "alpha").result().status_code == 200
    assert all(asked.result().status_code == 200 for asked in accepted)


def test_a_rate_is_of_each_key_and_keys_of_the_file_count(server: KeyedServer) -> None:
    def post(key: str) -> httpx.Response:
        return client.post("/tokenize", json={"model": "default", "prompt": "x"}, headers={"x-api-key": key})

    with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
        assert post("of nobody").status_code == 401
        statuses = [post(KEYS["gamma"]).status_code for _ in range(PER_MINUTE)]
        assert set(statuses) <= {200, 429} and statuses[:100] == [200] * 100
        refused = post(KEYS["gamma"])
        while refused.status_code == 200:  # the bucket fills while it is emptied
            refused = post(KEYS["gamma"])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert post(KEYS["beta"]).status_code == 200


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
@pytest.mark.parametrize("what", ["a stream", "complete answers"])
def test_a_client_that_does_not_read_is_cut_off_and_holds_nothing(server: KeyedServer, what: str) -> None:
    server.wait_for(lambda: "target.beat" in Footprint.of(server).run_files, "the target touches its beat", WAIT_S)
    before = Footprint.of(server)
    if what == "a stream":  # megabytes: the system's own buffers take two or three
        sent = request(BODY | {"stream": True, "max_tokens": 400, "n": MAX_QUEUE, "logprobs": 5, "temperature": 1})
    else:
        sent = f"GET /metrics HTTP/1.1\r\nhost: x\r\nx-api-key: {KEYS['beta']}\r\n\r\n".encode() * 400
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(sent)
        server.wait_for(lambda: Footprint.of(server).frontend_files > before.frontend_files, "connected")
        if what == "a stream":
            server.wait_for(lambda: server.metric("vllm:num_requests_running") == 1, "it runs")
            server.wait_for(
                lambda: server.metric("tandem:requests_cancelled_total", state="waiting") >= 1, "cancelled", WAIT_S
            )
        server.wait_for(lambda: Footprint.of(server) == before, "cut off", WAIT_S)
    assert server.health() == 200
