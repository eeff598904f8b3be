"""Another model, or none, is loaded while HTTP goes on; one that cannot be loaded leaves the old one serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults.test_kills import IS_LONG
from tests.support import tiny_model
from tests.support.server import READY_S, Server
from tests.support.stream import BODY, Stream, held_stream

pytestmark = [pytest.mark.system, pytest.mark.mlx]

ADMIN = {"authorization": "Bearer admin-key"}
PROMPT = "the very same prompt, long enough for a cached block of its own"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(model, tmp_path_factory.mktemp("server"), admin_key="admin-key", max_early_deaths=100) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """One connection for a whole test: it has to last."""
    with httpx.Client(base_url=server.url, timeout=READY_S, limits=httpx.Limits(max_connections=1)) as client:
        yield client


def change(http: httpx.Client, what: str, **body: Any) -> httpx.Response:
    return http.post(f"/v1/models/{what}", json=body, headers=ADMIN)


def ask(http: httpx.Client, prompt: str = PROMPT) -> tuple[str, int]:
    """(text, cached tokens)"""
    answer = http.post("/v1/completions", json=BODY | {"prompt": prompt, "max_tokens": 24})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    return content["choices"][0]["text"], content["usage"]["prompt_tokens_details"]["cached_tokens"]


def served(http: httpx.Client) -> str:
    name: str = http.get("/v1/models").json()["data"][0]["id"]
    return name


def test_another_model_takes_over_once_streams_have_ended_and_unloading_frees_it(
    server: Server, http: httpx.Client, model: Path, other: Path
) -> None:
    before, _ = ask(http)
    assert ask(http)[1] > 0
    whole = Stream(server, max_tokens=200).result()
    frontend = server.worker("frontend")
    stream, target = held_stream(server, max_tokens=200)
    begun = change(http, "load", model=str(other))
    assert (begun.status_code, begun.json()["state"]) == (202, "checking")
    assert change(http, "load", model=str(other)).status_code == 503, "one change at a time"
    server.wait_for(lambda: http.get("/health").json()["status"] == "loading", "loading")
    refused = http.post("/v1/completions", json=BODY)
    assert (refused.status_code, "being loaded" in refused.text) == (503, True)
    assert int(refused.headers["retry-after"]) >= 1
    assert stream.is_alive()
    target.resume()
    assert stream.result() == whole
    server.wait_ready()
    assert http.get("/health").json()["model_change"] == {"state": "done", "model": str(other)}
    assert served(http) == "other"
    text, cached = ask(http)
    assert text != before
    assert cached == 0, "another model's blocks are never met"
    assert server.metric("vllm:request_success_total", model_name="other") >= 1
    _unload(server, http)
    again = change(http, "load", model=str(model), wait=True)
    assert (again.status_code, again.json()["state"]) == (200, "done"), again.text
    assert served(http) == "tiny"
    assert ask(http)[0] == before
    assert server.worker("frontend") == frontend


def _unload(server: Server, http: httpx.Client) -> None:
    target = server.worker("workers.target")
    assert change(http, "unload", wait=True).status_code == 200
    psutil.wait_procs([target], timeout=10)
    assert not target.is_running()
    with pytest.raises(AssertionError, match="does not run"):
        server.worker("workers.target")
    health = http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "unloaded")
    assert http.post("/v1/completions", json=BODY).status_code == 503


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_a_model_that_cannot_be_loaded_is_told_before_anything_stops(
    server: Server, http: httpx.Client, other: Path, tmp_path: Path
) -> None:
    target, expected = server.worker("workers.target"), ask(http)[0]
    broken = shutil.copytree(other, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    unknown = shutil.copytree(other, tmp_path / "unknown")
    config = (unknown / "config.json").read_text()
    (unknown / "config.json").write_text(config.replace('"llama"', '"no_such_architecture"'))
    cases = [(broken, "model.safetensors"), (unknown, "no_such"), (tmp_path / "absent", "no model at")]
    for folder, why in cases:
        refused = change(http, "load", model=str(folder), wait=True)
        assert refused.status_code == 400
        assert why in refused.json()["error"]["message"]
        assert http.get("/health").json()["model_change"]["state"] == "failed"
    assert server.health() == 200
    assert server.worker("workers.target") == target
    assert ask(http)[0] == expected
    http.headers["authorization"] = "Bearer somebody"
    assert http.post("/v1/models/load", json={"model": str(other)}).status_code == 403
    assert http.post("/v1/models/unload").status_code == 403


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_a_model_that_fails_after_all_its_checks_is_taken_back(
    server: Server, http: httpx.Client, other: Path, tmp_path: Path
) -> None:
    """Its drafter has other end tokens, which only the drafter's process finds."""
    expected = ask(http)[0]
    drafter = tiny_model.write(tmp_path / "drafter", seed=2)
    config = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    failed = change(http, "load", model=str(other), draft_model=str(drafter), wait=True)
    assert failed.status_code == 500
    assert "could not be loaded" in failed.json()["error"]["message"]
    server.wait_ready()
    assert served(http) == "tiny"
    assert ask(http)[0] == expected


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_a_target_that_dies_while_it_loads_is_followed_by_the_old_one(
    server: Server, http: httpx.Client, other: Path
) -> None:
    expected, before = ask(http)[0], server.worker("workers.target")
    assert change(http, "load", model=str(other)).status_code == 202
    psutil.wait_procs([before], timeout=READY_S)
    server.wait_for(lambda: _kill(server), "killed while it loads")
    server.wait_for(lambda: http.get("/health").json()["model_change"]["state"] == "failed", "given up", READY_S)
    assert "died while it loaded" in http.get("/health").json()["model_change"]["error"]
    assert ask(http)[0] == expected
    assert served(http) == "tiny"


def _kill(server: Server) -> bool:
    try:
        server.worker("workers.target").kill()
    except (AssertionError, psutil.NoSuchProcess):
        return False
    return True
