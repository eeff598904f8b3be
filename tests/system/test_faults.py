"""Processes die in the middle of their work."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support import tiny_model
from tests.support.server import READY_S, Server
from tests.support.stream import BODY, Stream

pytestmark = [pytest.mark.system, pytest.mark.mlx]

SAMPLED = {"temperature": 1.0, "seed": 7}
MAX_TRIES = 8
PROMPTS = ("undisturbed", "another one", "x")


def start_streams(server: Server) -> list[Stream]:
    return [*(Stream(server, prompt=p, logprobs=1) for p in PROMPTS), Stream(server, logprobs=1, **SAMPLED)]


def tokens(streams: list[Stream]) -> list[list[str]]:
    for stream in streams:
        stream.result()
    return [stream.tokens for stream in streams]


def kill_in_the_middle(server: Server, module: str) -> list[list[str]]:
    """Kill a process while four streams run; what the streams gave in the end."""
    for _ in range(MAX_TRIES):
        streams = start_streams(server)
        for stream in streams:
            stream.wait_chunks(5)
        if all(len(s.tokens) < BODY["max_tokens"] for s in streams):
            server.worker(module).kill()
            return tokens(streams)
        tokens(streams)  # this process was kept from running until a stream had ended
    raise AssertionError("the streams had always ended before")


@pytest.mark.parametrize("module", ["workers.target", "scheduler", "workers.drafter"])
def test_kill_9_in_the_middle_of_streams_changes_no_token(server: Server, module: str) -> None:
    expected = tokens(start_streams(server))
    assert [len(e) for e in expected] == [BODY["max_tokens"]] * 4
    role = module.rpartition(".")[2]
    before = server.metric("tandem:worker_restarts_total", role=role)
    assert kill_in_the_middle(server, module) == expected
    server.wait_ready()
    assert tokens(start_streams(server)) == expected
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "idle")
    if module != "scheduler":  # its own restart begins new counters
        server.wait_for(
            lambda: server.metric("tandem:worker_restarts_total", role=role) == before + 1, "restart counted"
        )


def test_kill_9_of_a_drafter_that_drafts_changes_no_token(server: Server, model: Path, tmp_path: Path) -> None:
    expected = tokens(start_streams(server))
    eagle = tiny_model.write_eagle3(tmp_path / "eagle", model)
    with Server(model, tmp_path, max_num_seqs=16, draft_model=eagle, cache_dir=tmp_path / "cache") as drafted:
        drafted.wait_for(lambda: drafted.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
        assert tokens(start_streams(drafted)) == expected
        assert drafted.metric("vllm:spec_decode_num_drafts_total") > 0
        drafted.wait_for(lambda: drafted.metric("tandem:feature_bytes_total") > 0, "feature bytes told by a heartbeat")
        assert kill_in_the_middle(drafted, "workers.drafter") == expected
        drafted.wait_for(lambda: drafted.metric("tandem:worker_up", role="drafter") == 1, "drafter back", READY_S)
        assert tokens(start_streams(drafted)) == expected


def test_health_says_503_while_the_target_is_away(server: Server) -> None:
    target = server.worker("workers.target")
    target.suspend()
    try:
        server.wait_for(lambda: server.health() == 503, "unhealthy", 30)
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=30)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        target.resume()
    server.wait_ready()
    assert Stream(server).result()
