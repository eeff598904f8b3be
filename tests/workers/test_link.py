"""A worker's connection to the scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from shared.config import Settings
from shared.messages import Heartbeat, ToDrafter, Welcome
from shared.wire import encode
from workers.link import Link


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(run_dir=str(tmp_path), heartbeat_interval_s=0.05, step_timeout_s=0.5)


@pytest.fixture
def scheduler(settings: Settings) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.bind(settings.engine_endpoint)
        yield socket


def test_heartbeats_do_not_hold_up_an_idle_worker(settings: Settings, scheduler: zmq.Socket[bytes]) -> None:
    """It has to come back: to say Ready again, and to show its supervisor that it lives."""
    link = Link(settings, "drafter", ToDrafter, dict)
    stopped = threading.Event()
    try:
        link.hello()
        identity, _ = scheduler.recv_multipart()

        def beat() -> None:
            while not stopped.wait(0.02):
                scheduler.send_multipart([identity, encode(Heartbeat(instance_id="s"))])

        beats = threading.Thread(target=beat)
        beats.start()
        started = time.monotonic()
        assert link.receive(0.3) is None
        assert time.monotonic() - started < 5.0
        stopped.set()
        beats.join()
        scheduler.send_multipart([identity, encode(Welcome(scheduler_id="s", epoch=1))])
        assert isinstance(link.receive(20.0), Welcome)
    finally:
        stopped.set()
        link.close()
