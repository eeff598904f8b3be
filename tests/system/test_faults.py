"""Processes die, start in any order, and get nonsense on their sockets."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from shared.messages import Cancel, Hello, RequestId, StepResult
from shared.wire import encode
from tests.support.server import REPOSITORY, Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

BODY = {"model": "default", "prompt": "undisturbed", "max_tokens": 300, "temperature": 0, "ignore_eos": True}


class Stream(threading.Thread):
    """One streaming completion, read in a thread."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(daemon=True)
        self.server, self.body = server, {**BODY, "stream": True, **options}
        self.text, self.error = "", ""
        self.num_chunks = 0
        self.start()

    def run(self) -> None:
        import json

        try:
            with httpx.stream("POST", f"{self.server.url}/v1/completions", json=self.body, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            self.error = str(chunk["error"])
                        else:
                            self.text += chunk["choices"][0]["text"]
                            self.num_chunks += 1
        except httpx.HTTPError as error:
            self.error = repr(error)

    def wait_chunks(self, n: int) -> None:
        self.server.wait_for(lambda: self.num_chunks >= n or not self.is_alive(), f"{n} chunks")

    def result(self) -> str:
        self.join(timeout=120)
        assert not self.is_alive(), "the stream does not end"
        assert not self.error, self.error
        return self.text


@pytest.mark.parametrize("module", ["workers.target", "scheduler", "workers.drafter"])
def test_kill_9_in_the_middle_of_streams_changes_no_token(server: Server, module: str) -> None:
    prompts = ["undisturbed", "another one", "x"]
    sampled = {"temperature": 1.0, "seed": 7}
    expected = [Stream(server, prompt=p).result() for p in prompts] + [Stream(server, **sampled).result()]
    streams = [Stream(server, prompt=p) for p in prompts] + [Stream(server, **sampled)]
    for stream in streams:
        stream.wait_chunks(5)
    os.kill(server.worker(module).pid, signal.SIGKILL)
    assert [s.result() for s in streams] == expected
    server.wait_ready()
    assert Stream(server, prompt=prompts[1]).result() == expected[1]
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "idle")
    if module != "scheduler":  # its own restart begins new counters
        role = module.rpartition(".")[2]
        server.wait_for(lambda: server.metric("tandem:worker_restarts_total", role=role) >= 1, "restart counted")


def test_health_says_503_while_the_target_is_away(server: Server) -> None:
    os.kill(server.worker("workers.target").pid, signal.SIGSTOP)
    stopped = server.worker("workers.target").pid
    try:
        server.wait_for(lambda: server.health() == 503, "unhealthy", 30)
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=30)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        os.kill(stopped, signal.SIGCONT)
    server.wait_ready()
    assert Stream(server).result()


def test_nonsense_on_the_engine_socket_is_counted_and_dropped(server: Server) -> None:
    expected = Stream(server).result()
    before = server.metric("tandem:dropped_messages_total")
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.IDENTITY, b"nonsense")
    socket.set(zmq.LINGER, 0)
    socket.connect(f"ipc://{server.run_dir}/engine.sock")
    stream = Stream(server)
    try:
        hello = encode(Hello(role="frontend", instance_id="nonsense", pid=1))
        frames: list[list[bytes]] = [[os.urandom(n)] for n in (1, 3, 17, 200, 5000)]
        frames += [[hello[:n]] for n in range(1, len(hello) - 1, 7)]
        frames += [[b""], [hello, b"extra frame"], [b"\xc1"], [b"\x91" * 10_000]]
        for message in frames:
            socket.send_multipart(message)
        cancel = encode(Cancel(request_id=RequestId("of somebody else")))
        socket.send(cancel)  # a stranger: asked to say hello
        socket.send(hello)
        for _ in range(20):
            socket.send(cancel)
            socket.send(encode(StepResult(epoch=1, step_id=1, rows=[], phases={})))  # not the target's, an old epoch
        server.wait_for(
            lambda: server.metric("tandem:dropped_messages_total") >= before + len(frames) + 1 + 20, "all counted"
        )
    finally:
        socket.close()
        context.term()
    assert stream.result() == expected
    assert server.health() == 200


COMMANDS = ("frontend", "scheduler", "workers.target", "workers.drafter")


@pytest.mark.parametrize("order", list(itertools.permutations(COMMANDS))[::6], ids="-".join)
def test_the_order_of_starting_does_not_matter(order: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for module in order:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module], cwd=REPOSITORY, env=server.environment,
                    stderr=server.log.open("ab"), stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
            time.sleep(0.3)  # apart, so that the order is what it says
        server.wait_ready()
        assert Stream(server, max_tokens=8).result()
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=10) for process in started]
    assert codes == [0, 0, 0, 0]


def test_ctrl_c_stops_everything_cleanly_and_in_time(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path).start()
    stream = Stream(server, max_tokens=450)
    stream.wait_chunks(3)
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 6.0
    assert "Traceback" not in server.log.read_text()
    assert "Tandem is ready on " in server.log.read_text()
    assert not list(server.run_dir.glob("*.lock"))


def test_a_model_that_cannot_be_loaded_ends_the_tree_with_a_clear_message(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    server = Server(broken, tmp_path).start(wait=False)
    assert server.process is not None
    assert server.process.wait(timeout=60) != 0
    log = server.log.read_text()
    assert "target:" in log and "model.safetensors" in log
    assert "Traceback" not in log


def test_a_misspelt_setting_stops_start_up(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path, max_num_seq=4).start(wait=False)
    assert server.process is not None
    assert server.process.wait(timeout=30) == 78
    assert "TANDEM_MAX_NUM_SEQ" in server.log.read_text()
