"""Nonsense, strangers and impostors on every ZeroMQ socket: counted and dropped, and no token changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from shared.config import Settings
from shared.messages import (
    Cancel,
    DraftReply,
    FeatureRows,
    Features,
    Heartbeat,
    Hello,
    Message,
    Ready,
    RequestId,
    RowResult,
    StepResult,
    TensorSpec,
    Welcome,
    WorkerFailed,
    WorkerInfo,
)
from shared.sockets import secure, write_keys
from shared.wire import MAX_HEADER_BYTES, Decoder, encode
from tests.faults.test_kills import IS_LONG
from tests.support import tiny_model
from tests.support.fake_target import worker_info
from tests.support.server import READY_S, Server, free_port
from tests.support.stream import Stream

pytestmark = [pytest.mark.system, pytest.mark.mlx]

RANDOM = [os.urandom(n) for n in (1, 3, 17, 200, 5000)]
DROPPED = "tandem:dropped_messages_total"
Connect = Callable[..., zmq.Socket[bytes]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Sockets that are closed after the test, without waiting for anybody."""
    context = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def open_socket(
        server: Server, kind: int, name: str, identity: bytes | None = None, address: str = "",
        keys: Settings | None = None,
    ) -> zmq.Socket[bytes]:  # fmt: skip
        socket = context.socket(kind)
        sockets.append(socket)
        socket.set(zmq.LINGER, 0)
        if identity is not None:
            socket.set(zmq.IDENTITY, identity)
        if keys is not None:
            secure(socket, keys, address, is_server=False)
        socket.connect(address or f"ipc://{server.run_dir}/{name}.sock")
        return socket

    yield open_socket
    for socket in sockets:
        socket.close()
    context.term()


def truncated(message: bytes) -> list[bytes]:
    return [message[:n] for n in range(1, len(message) - 1, 7)]


def receive(socket: zmq.Socket[bytes], union: Any) -> Message:
    """The next message of this type that the scheduler sends us."""
    decoder = Decoder(union)
    assert socket.poll(20_000), "the scheduler does not answer"
    message: Message = decoder.decode(socket.recv())
    return message


def test_nonsense_on_the_engine_socket_is_counted_and_dropped(server: Server, connect: Connect) -> None:
    expected = Stream(server).result()
    before = server.metric(DROPPED, reason="bad")
    socket = connect(server, zmq.DEALER, "engine", b"nonsense")
    stream = Stream(server)
    hello = encode(Hello(role="frontend", instance_id="nonsense", pid=1))
    frames = [[r] for r in (*RANDOM, *truncated(hello), b"", b"\xc1", b"\x91" * 10_000, b"\0" * (MAX_HEADER_BYTES + 1))]
    frames += [[hello, b"extra frame"], [b"", b"", b""], [encode(Heartbeat(instance_id="n\u00f6"))]]
    for message in frames:
        socket.send_multipart(message)
    connect(server, zmq.DEALER, "engine", b"\xff\xfe").send(hello)  # an identity that is not text
    server.wait_for(lambda: server.metric(DROPPED, reason="bad") == before + len(frames) + 1, "all counted")
    assert stream.result() == expected
    assert server.health() == 200


def test_messages_of_strangers_and_of_an_older_epoch_are_counted_and_dropped(server: Server, connect: Connect) -> None:
    expected = Stream(server).result()

    def counts() -> list[float]:
        return [server.metric(DROPPED, reason=r) for r in ("unknown_peer", "old_epoch", "unexpected")]

    before = counts()
    socket = connect(server, zmq.DEALER, "engine", b"known")
    stream = Stream(server)
    cancel = encode(Cancel(request_id=RequestId("of somebody else")))
    socket.send(cancel)  # from a stranger, who is asked to say hello
    socket.send(encode(Hello(role="frontend", instance_id="known", pid=1)))
    for _ in range(20):
        socket.send(cancel)  # of a request that is not there: it may have ended meanwhile
        for step_id in (0, 1, 2**40):
            socket.send(
                encode(StepResult(epoch=1, step_id=step_id, rows=[RowResult(slot=0, token_ids=[1])], phases={}))
            )
        socket.send(encode(Ready(epoch=0, info=worker_info())))
        socket.send(encode(DraftReply(epoch=1, draft_id=1, drafts=[], seconds=0.0)))
    expected_counts = [before[0] + 1, before[1] + 20 * 4, before[2] + 20]
    server.wait_for(lambda: counts() == expected_counts, f"counted as {expected_counts}")
    assert stream.result() == expected
    assert server.health() == 200


@pytest.mark.parametrize("absurd", [{"num_slots": 1 << 60}, {"capacity_classes": []}, {"num_slots": 0}])
def test_an_impostor_of_the_target_delays_streams_and_changes_none(
    server: Server, connect: Connect, absurd: dict[str, Any]
) -> None:
    expected = Stream(server).result()
    before = server.metric(DROPPED, reason="bad")
    stream = Stream(server)
    stream.wait_chunks(5)
    target = server.worker("workers.target")
    target.suspend()  # its next heartbeat would have it back before the impostor says all
    try:
        socket = connect(server, zmq.DEALER, "engine", b"impostor")
        socket.send(encode(Hello(role="target", instance_id="impostor", pid=1)))
        welcome = receive(socket, Welcome)
        assert isinstance(welcome, Welcome)
        info: WorkerInfo = worker_info(**absurd)
        socket.send(encode(Ready(epoch=welcome.epoch, info=info)))
        socket.send(encode(WorkerFailed(epoch=welcome.epoch, reason="not at all")))
        server.wait_for(lambda: server.metric(DROPPED, reason="bad") == before + 1, "absurd facts dropped")
    finally:
        target.resume()
    assert stream.result() == expected  # the real one was asked to say hello again
    server.wait_ready()


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_over_tcp_only_who_has_the_keys_is_heard(server: Server, model: Path, tmp_path: Path, connect: Connect) -> None:
    """All four processes over CurveZMQ, the features too; strangers are not even counted as such."""
    expected = Stream(server).result()
    for name in ("ours", "theirs"):
        write_keys(tmp_path / name)
    engine, features = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    eagle = tiny_model.write_eagle3(tmp_path / "eagle", model)
    with Server(
        model, tmp_path, max_num_seqs=16, draft_model=eagle, draft_tokens=2, engine_address=engine,
        features_address=features, curve_keys_file=tmp_path / "ours",
    ) as curved:  # fmt: skip
        curved.wait_for(lambda: curved.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
        assert Stream(curved).result() == expected
        curved.wait_for(lambda: curved.metric("tandem:feature_bytes_total") > 0, "features")
        hello = encode(Hello(role="frontend", instance_id="knocking", pid=1))
        files = ("", str(tmp_path / "theirs"), str(tmp_path / "ours"))
        knocking = [
            connect(curved, zmq.DEALER, "", b"knocking", engine, Settings(curve_keys_file=file)) for file in files
        ]
        for socket in knocking:
            socket.send_multipart([b"nonsense"])
            socket.send(hello)
        assert isinstance(receive(knocking[2], Welcome), Welcome)
        assert not any(socket.poll(1000) for socket in knocking[:2]), "somebody else got in"
        assert curved.metric(DROPPED, reason="bad") == 1, "of the one with the keys"
        assert Stream(curved).result() == expected


def test_nonsense_on_the_features_socket_is_counted_and_dropped(
    server: Server, model: Path, tmp_path: Path, connect: Connect
) -> None:
    expected = Stream(server).result()
    eagle = tiny_model.write_eagle3(tmp_path / "eagle", model)
    with Server(model, tmp_path, max_num_seqs=16, draft_model=eagle, cache_dir=tmp_path / "cache") as drafted:
        drafted.wait_for(lambda: drafted.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
        socket = connect(drafted, zmq.PUSH, "features")
        stream = Stream(drafted)
        rows = [FeatureRows(request_id=RequestId("r"), start=0, num_rows=2)]

        def header(dtype: str, *shape: int) -> bytes:
            return encode(Features(epoch=1, rows=rows, tensor=TensorSpec(dtype=dtype, shape=list(shape))))

        good = header("float32", 2, 48)
        bodies = [b"", bytes(2 * 48 * 4 - 1), bytes(2 * 48 * 4 + 1)]
        messages = [[r, bytes(8)] for r in (*RANDOM, *truncated(good))] + [[good, body] for body in bodies]
        messages += [[good], [good, bytes(384), b"extra"], [header("float32", 3, 48), bytes(3 * 48 * 4)]]
        messages += [[header("object", 2, 48), bytes(384)], [header("float32", -2, -48), bytes(384)]]
        messages += [[header("uint8", 384, 1), bytes(384)], [header("float32", 96), bytes(384)]]
        for message in messages:
            socket.send_multipart(message)
        drafted.wait_for(lambda: drafted.metric(DROPPED, reason="by_peer") == len(messages), "all counted")
        assert stream.result() == expected
        assert Stream(drafted).result() == expected
        assert drafted.metric("tandem:worker_restarts_total", role="drafter") == 0
