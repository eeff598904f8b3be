"""The frontend dies or stands still: clients see their connection close, nothing leaks, the server comes back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.load import Footprint, check_nothing_leaked
from tests.faults.test_kills import IS_LONG, SETTINGS
from tests.support.server import Server
from tests.support.stream import Stream, hold, wait_in_engine

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

NUM_STREAMS = 4
WAIT_S = 60.0


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(model, tmp_path_factory.mktemp("server"), **SETTINGS) as running:
        yield running


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_clients_see_a_closed_connection_and_slots_are_freed(
    server: Server, number: signal.Signals, record_property: Callable[[str, object], None]
) -> None:
    expected = Stream(server).result()
    check_nothing_leaked(server)
    before = Footprint.of(server)
    frontend, target = server.worker("frontend"), hold(server)  # so that no stream is over before the signal
    try:
        streams = [Stream(server) for _ in range(NUM_STREAMS)]
        wait_in_engine(server, NUM_STREAMS)
        frontend.send_signal(number)
        struck = time.monotonic()
    finally:
        target.resume()
    for stream in streams:
        stream.join(WAIT_S)
        assert not stream.is_alive(), "a client waits for ever"
        assert stream.error, "a stream ended as if it were whole"
        assert stream.text != expected
    server.wait_ready()
    record_property("recovery_s", time.monotonic() - struck)
    assert server.worker("frontend") != frontend
    check_nothing_leaked(server, before)
    assert server.worker("workers.target") == target, "the other processes went on"
    assert Stream(server).result() == expected
