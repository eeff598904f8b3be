"""Beyond the hard memory limit streams take turns instead of failing, and their tokens stay the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.test_kills import IS_LONG
from tests.support.server import REPOSITORY, Server
from tests.support.stream import BODY, Stream

pytestmark = [pytest.mark.system, pytest.mark.mlx]

MODULES = ("scheduler", "frontend", "workers.target")
NUM_STREAMS = 4
OPTIONS = {"max_tokens": 400, "logprobs": 1}


class Tree:
    """The processes, each started by the test, so that the scheduler can be replaced by one with other settings."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, module: str, **settings: int) -> None:
        environment = self.server.environment | {f"TANDEM_{k.upper()}": str(v) for k, v in settings.items()}
        with self.server.log.open("ab") as log:
            self.started[module] = subprocess.Popen(
                [sys.executable, "-m", module], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )

    def kill(self, module: str) -> None:
        self.started[module].kill()
        self.started.pop(module).wait()


@pytest.fixture
def tree(model: Path, tmp_path: Path) -> Iterator[Tree]:
    running = Tree(Server(model, tmp_path, max_num_seqs=8))
    try:
        for module in MODULES:
            running.start(module)
        running.server.wait_ready()
        yield running
    finally:
        for process in running.started.values():
            process.send_signal(signal.SIGTERM)
        for process in running.started.values():
            process.wait(timeout=20)


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_beyond_the_soft_limit_nobody_new_gets_in_caches_shrink_and_what_runs_goes_on(tree: Tree) -> None:
    server = tree.server
    expected = [(s.result(), s.tokens) for s in [Stream(server, prompt="one that runs", **OPTIONS)]]
    server.wait_for(lambda: server.metric("tandem:prefix_blocks", tier="device") > 0, "cached blocks")
    stream = Stream(server, prompt="one that runs", **OPTIONS)
    stream.wait_chunks(2)
    tree.kill("scheduler")
    assert stream.is_alive(), "it had ended before"
    tree.start("scheduler", memory_limit_bytes=4, memory_hard_limit_bytes=1 << 60, heartbeat_interval_s=1)
    assert [(stream.result(), stream.tokens)] == expected
    refused = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert (refused.status_code, "memory is full" in refused.text) == (429, True)
    assert int(refused.headers["retry-after"]) >= 1
    assert server.metric("tandem:requests_rejected_total", reason="memory") >= 1
    assert server.metric("vllm:num_preemptions_total") == 0
    server.wait_for(lambda: server.metric("tandem:prefix_evictions_total") >= 1, "the cache gave its blocks back")
    tree.kill("scheduler")
    tree.start("scheduler")
    server.wait_ready()
    assert Stream(server, prompt="one that runs", **OPTIONS).result() == expected[0][0]


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_streams_take_turns_beyond_the_hard_limit_and_none_changes(tree: Tree) -> None:
    server = tree.server
    prompts = [f"stream number {i}" for i in range(NUM_STREAMS)]
    undisturbed = [Stream(server, prompt=p, **OPTIONS) for p in prompts]
    expected = [(s.result(), s.tokens) for s in undisturbed]
    streams = [Stream(server, prompt=p, **OPTIONS) for p in prompts]
    for stream in streams:
        stream.wait_chunks(2)
    target = tree.started["workers.target"]
    tree.kill("scheduler")
    assert all(s.is_alive() for s in streams), "the streams had ended before"
    # Four bytes are the limit: whatever the processes do, they are beyond it.
    tree.start("scheduler", memory_limit_bytes=4, memory_hard_limit_bytes=5, heartbeat_interval_s=1)
    server.wait_for(lambda: server.metric("vllm:num_preemptions_total") >= 1, "a preemption", 60)
    refused = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert (refused.status_code, "memory is full" in refused.text) == (429, True)
    assert int(refused.headers["retry-after"]) >= 1
    assert [(s.result(), s.tokens) for s in streams] == expected
    assert server.metric("tandem:prefix_evictions_total") >= 1, "the cache gave its blocks back"
    assert target.poll() is None
