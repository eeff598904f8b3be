"""A Gemma 4 with its assistant in real processes: text, images and clips, with and without the drafter, and deaths."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.faults.test_kills import IS_LONG
from tests.support import tiny_gemma4
from tests.support.server import READY_S, Server

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

WAIT_S = 120.0
NUM_TOKENS = 150  # many windows
MAX_TRIES = 8


def clip(seed: int) -> dict[str, Any]:
    stream = io.BytesIO()
    soundfile.write(stream, np.random.default_rng(seed).standard_normal(8000) * 0.1, 16_000, format="WAV")
    return {"type": "input_audio", "input_audio": {"data": _base64(stream), "format": "wav"}}


def image(seed: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(stream, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + _base64(stream)}}


def _base64(stream: io.BytesIO) -> str:
    return base64.b64encode(stream.getvalue()).decode()


WORDS = {"type": "text", "text": "what is it? "}
PROMPTS: list[list[dict[str, Any]]] = [[WORDS], [WORDS, clip(1)], [clip(2), WORDS, image(3), clip(4)]]


class Answers:
    """One greedy chat for each prompt, in threads of their own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._got: list[Any] = [None] * len(PROMPTS)
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(len(PROMPTS))]
        for thread in self._threads:
            thread.start()

    def _ask(self, index: int) -> None:
        body = {
            "model": "default", "messages": [{"role": "user", "content": PROMPTS[index]}], "temperature": 0,
            "ignore_eos": True, "max_tokens": NUM_TOKENS, "logprobs": True,
        }  # fmt: skip
        answer = httpx.post(f"{self._server.url}/v1/chat/completions", json=body, timeout=WAIT_S)
        self._got[index] = answer.json() if answer.status_code == 200 else answer.text

    @property
    def are_running(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def tokens(self) -> list[list[str]]:
        for thread in self._threads:
            thread.join(WAIT_S)
        assert all(isinstance(got, dict) for got in self._got), self._got
        return [[entry["token"] for entry in got["choices"][0]["logprobs"]["content"]] for got in self._got]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma4.write(tmp_path_factory.mktemp("gemma4") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    with Server(model, tmp_path_factory.mktemp("plain"), max_num_seqs=4, draft_model="none") as server:
        tokens = Answers(server).tokens()
    assert [len(t) for t in tokens] == [NUM_TOKENS] * len(PROMPTS)
    assert all(len(set(t)) > 10 for t in tokens), "a text that tells nothing"
    return tokens


@pytest.fixture(scope="module")
def drafted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("drafted")
    assistant = tiny_gemma4.write_assistant(folder / "assistant", model)
    with Server(model, folder, max_num_seqs=4, draft_model=assistant, draft_tokens=3) as server:
        server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
        yield server


def kill_in_the_middle(server: Server, module: str) -> list[list[str]]:
    for _ in range(MAX_TRIES):
        before = server.metric("vllm:generation_tokens_total")
        answers = Answers(server)
        server.wait_for(
            lambda before=before: server.metric("vllm:generation_tokens_total") >= before + 30, "some tokens", WAIT_S
        )
        if answers.are_running:
            server.worker(module).kill()
            return answers.tokens()
        answers.tokens()
    raise AssertionError("an answer had always ended before")


def test_the_assistant_changes_no_token_and_some_of_its_drafts_are_asked_for(
    drafted: Server, expected: list[list[str]]
) -> None:
    assert Answers(drafted).tokens() == expected
    assert drafted.metric("vllm:spec_decode_num_draft_tokens_total") > NUM_TOKENS
    drafted.wait_for(lambda: drafted.metric("tandem:feature_bytes_total") > 0, "feature bytes told by a heartbeat")


@pytest.mark.parametrize("module", ["workers.drafter", "workers.target"])
def test_a_death_amid_clips_and_images_changes_no_token(
    drafted: Server, expected: list[list[str]], module: str
) -> None:
    role = module.rpartition(".")[2]
    before = drafted.metric("tandem:worker_restarts_total", role=role)
    assert kill_in_the_middle(drafted, module) == expected
    drafted.wait_for(
        lambda: drafted.metric("tandem:worker_restarts_total", role=role) > before, "restart counted", READY_S
    )
    drafted.wait_for(lambda: drafted.metric("tandem:worker_up", role=role) == 1, f"{role} back", READY_S)
    drafts = drafted.metric("vllm:spec_decode_num_draft_tokens_total")
    assert Answers(drafted).tokens() == expected
    assert drafted.metric("vllm:spec_decode_num_draft_tokens_total") > drafts, "no draft after the death"
