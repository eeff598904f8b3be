"""A worker that cannot come back: every live request ends with one clear error, and the whole server with it."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support import tiny_model
from tests.support.server import Server
from tests.support.stream import BODY

pytestmark = [pytest.mark.system, pytest.mark.mlx]

WAIT_S = 60.0
NUM_STREAMS = 4


class Lines(threading.Thread):
    """One stream; all that came."""

    def __init__(self, server: Server, prompt: str) -> None:
        super().__init__(daemon=True)
        self.url, self.body = f"{server.url}/v1/completions", {**BODY, "prompt": prompt, "stream": True}
        self.lines: list[str] = []
        self.broken = ""
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=WAIT_S) as answer:
                for line in answer.iter_lines():
                    self.lines.append(line)
        except httpx.HTTPError as error:
            self.broken = repr(error)


def test_a_target_that_cannot_come_back_ends_every_stream_with_one_error_and_the_server(tmp_path: Path) -> None:
    model = tiny_model.write(tmp_path / "model")
    with Server(model, tmp_path) as server:
        family, target = server.tree(), server.worker("workers.target")
        target.suspend()  # so that no stream is over before
        streams = [Lines(server, f"stream {i}") for i in range(NUM_STREAMS)]
        in_engine = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        server.wait_for(lambda: sum(map(server.metric, in_engine)) == NUM_STREAMS, "in the engine")
        weights = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        target.kill()
        assert server.process is not None
        assert server.process.wait(timeout=WAIT_S) != 0
        _, alive = psutil.wait_procs(family, timeout=5.0)
        assert not alive
        for stream in streams:
            stream.join(WAIT_S)
            assert not stream.is_alive() and not stream.broken, stream.broken
            assert len([line for line in stream.lines if '"error":' in line]) == 1, stream.lines
            assert stream.lines[-2:] == ["data: [DONE]", ""]
        log = server.log.read_text()
        assert "model.safetensors" in log and "target refused to start" in log
        assert not list(server.run_dir.glob("*.pid"))
