"""Random messages: the scheduler's core keeps its books in order, and the scheduler process goes on answering."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from frontend.engine import EngineClient
from scheduler.core import Core
from scheduler.metrics import Metrics
from shared.config import Settings
from shared.errors import BadMessage
from shared.messages import Hello, Ready, RequestId, SamplingParams, Submit, ToFrontend, ToScheduler, Welcome
from shared.wire import Decoder, encode
from tests.fuzz.random_messages import damaged, random_frame, random_message
from tests.fuzz.scale import SEED, count
from tests.support.fake_target import worker_info

PEERS = ("front", "target", "drafter", "stranger")


def core_with_work(rng: random.Random) -> Core:
    """A target that is ready, and a few requests."""
    core = Core(Settings(max_queue=8), Metrics())
    core.handle("front", Hello(role="frontend", instance_id="front", pid=1), 1.0)
    sent = core.handle("target", Hello(role="target", instance_id="target", pid=2), 1.0)
    epoch = next(m.epoch for r, m in sent if r == "target" and isinstance(m, Welcome))
    core.handle("target", Ready(epoch=epoch, info=worker_info()), 1.0)
    for i in range(4):
        submit = Submit(
            request_id=RequestId(f"r{i}"), prompt_token_ids=[1, 2], sampling=SamplingParams(), max_tokens=20
        )
        core.handle("front", submit, 1.0)
    return core


def test_the_core_survives_wild_values_from_anybody() -> None:
    rng = random.Random(SEED)
    decoder = Decoder(ToScheduler)
    num_handled = 0
    for round_number in range(count(50, 8000)):
        core, now = core_with_work(rng), 1.0
        for _ in range(60):
            now += rng.choice((0.0, 0.001, 0.5))
            frame = encode(random_message(rng))
            try:
                message = decoder.decode(damaged(frame, rng) if rng.random() < 0.2 else frame)
            except BadMessage:
                continue
            core.handle(rng.choice(PEERS), message, now)
            core.check_integrity()
            num_handled += 1
            if rng.random() < 0.05:
                core.tick(now)
        core.shutdown(now)
        core.check_integrity()
        assert not core.status().num_running, round_number
    assert num_handled > 1000


def test_the_frontend_survives_wild_values_from_the_scheduler(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    decoder = Decoder(ToFrontend)

    async def play() -> int:
        client = EngineClient(Settings(run_dir=str(tmp_path)))
        await client.start()
        num_handled = 0
        try:
            for _ in range(count(5000, 100_000)):
                try:
                    message = decoder.decode(random_frame(rng))
                except BadMessage:
                    continue
                client._handle(message)
                num_handled += 1
        finally:
            await client.close()
        return num_handled

    assert asyncio.run(play()) > 500


@pytest.mark.system
def test_the_scheduler_process_answers_after_a_flood(tmp_path: Path) -> None:
    """Real sockets: whole, damaged and random messages, several frames, no frames, as fast as they go."""
    import os

    rng = random.Random(SEED)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    environment |= {"TANDEM_RUN_DIR": str(tmp_path), "TANDEM_LOG_LEVEL": "error", "TANDEM_MODEL": "none/none"}
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen([sys.executable, "-m", "scheduler"], env=environment, stdout=log, stderr=log)
    context = zmq.Context()
    try:
        sockets = [connect(context, tmp_path, name) for name in (b"one", b"two", b"three")]
        for _ in range(count(4000, 500_000)):
            socket = rng.choice(sockets)
            frames = [random_frame(rng)] * rng.choice((1,) * 20 + (2, 3))
            for part in (*frames[:-1],):
                socket.send(part, zmq.SNDMORE)
            socket.send(frames[-1])
            while socket.poll(0):
                socket.recv_multipart()
        last = connect(context, tmp_path, b"last")
        last.send(encode(Hello(role="frontend", instance_id="last", pid=1)))
        assert last.poll(60_000), "the scheduler does not answer"
        assert isinstance(Decoder(ToFrontend).decode(last.recv()), Welcome)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
        context.destroy(linger=0)
        log.close()
    text = (tmp_path / "log").read_text()
    assert code == 0 and "Traceback" not in text, text[-2000:]


def connect(context: zmq.Context[zmq.Socket[bytes]], folder: Path, name: bytes) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.set(zmq.IDENTITY, name)
    socket.set(zmq.SNDTIMEO, 60_000)
    socket.connect(f"ipc://{folder}/engine.sock")
    return socket
