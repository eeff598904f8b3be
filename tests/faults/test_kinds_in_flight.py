"""Kills while images, tool calls, grammars and seeds are in flight: every answer is the undisturbed one."""

from __future__ import annotations

import base64
import io
import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.faults.load import REFUSED, check_nothing_leaked
from tests.faults.test_kills import IS_LONG, MODULES, send
from tests.support import tiny_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

WAIT_S = 120.0
ROUNDS = 2
TOOL = {"type": "object", "properties": {"at": {"type": "string", "maxLength": 40}}, "required": ["at"]}
SCHEMA = {
    "type": "object",
    "properties": {
        "words": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 4, "maxItems": 9}
    },
    "required": ["words"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny Qwen2-VL with a drafter, whose template knows tools."""
    folder = tiny_model.write_qwen2_vl(tmp_path_factory.mktemp("vision") / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% if tools %}{{ tools | length }}{% endif %}" + settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    drafter = tiny_model.write(tmp_path_factory.mktemp("drafter") / "d", more=tiny_model.VISION_TOKENS)
    with Server(
        folder, tmp_path_factory.mktemp("server"), draft_model=drafter, draft_tokens=2, tool_parser="hermes",
        max_num_seqs=16, max_early_deaths=1000, heartbeat_timeout_s=3,
    ) as running:  # fmt: skip
        running.wait_for(lambda: running.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", WAIT_S)
        yield running


def image(seed: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(stream, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def kinds() -> dict[str, dict[str, Any]]:
    """Each kind of request with what must not be lost over a death: pixels, automata, draws."""
    words: dict[str, Any] = {"type": "text", "text": "what is it? "}
    sampled = {"temperature": 1.2, "seed": 5}
    wish = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": TOOL, "strict": True}}]
    return {
        "image": {"content": [words, image(1)], "temperature": 0, "ignore_eos": True, "max_tokens": 120},
        "image sampled": {"content": [image(2), words], **sampled, "ignore_eos": True, "max_tokens": 120},
        "image and schema": {"content": [image(3), words], **sampled, "response_format": wish, "max_tokens": 200},
        "tool call": {"content": "go", **sampled, "tools": tools, "tool_choice": "required", "max_tokens": 200},
        "regex": {"content": "x", **sampled, "structured_outputs": {"regex": "(ab|cd|e){40,60}"}, "max_tokens": 150},
        "greedy": {"content": "just words", "temperature": 0, "ignore_eos": True, "max_tokens": 150},
    }


def ask(server: Server, options: dict[str, Any]) -> tuple[int, Any]:
    """(status, what the answer says)"""
    body = {"model": "default", "logprobs": True, **options}
    body["messages"] = [{"role": "user", "content": body.pop("content")}]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    if answer.status_code != 200:
        return answer.status_code, answer.text[:300]
    (choice,) = answer.json()["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
    tokens = [entry["token"] for entry in (choice["logprobs"] or {"content": []})["content"] or []]
    return 200, (choice["message"]["content"], calls, tokens, choice["finish_reason"])


class Asking:
    """A thread for each kind asks again and again until `stop`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.expected = {name: ask(server, options) for name, options in kinds().items()}
        self.num_answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=item, daemon=True) for item in kinds().items()]

    def _run(self, name: str, options: dict[str, Any]) -> None:
        while not self._stopped.is_set():
            try:
                got = ask(self.server, options)
            except httpx.HTTPError as error:
                got = 0, repr(error)
            if got[0] in REFUSED:  # never accepted, and said so at once
                self._stopped.wait(0.2)
                continue
            if got != self.expected[name]:
                self.failures.append(f"{name}: {got}, not {self.expected[name]}")
            self.num_answers[name] += 1

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in self._threads), "an answer does not end"

    def wait_answers(self) -> None:
        """Until each kind has been answered once more."""
        before = Counter(self.num_answers)
        self.server.wait_for(
            lambda: all(self.num_answers[name] > before[name] for name in self.expected), "answers", WAIT_S
        )


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_kills_change_no_image_tool_or_grammar_answer(server: Server) -> None:
    with Asking(server) as asking:
        assert all(status == 200 for status, _ in asking.expected.values()), asking.expected
        assert asking.expected["tool call"][1][1], "a call was forced"
        asking.wait_answers()
        assert server.metric("vllm:spec_decode_num_drafts_total") > 0, server.log.read_text()[-3500:]
        for _ in range(ROUNDS):
            for victim in MODULES:
                server.wait_for(lambda: server.metric("vllm:num_requests_running") >= 2, "requests in flight")
                send(server, victim, signal.SIGKILL)
                asking.wait_answers()
    assert not asking.failures, asking.failures[:2]
    check_nothing_leaked(server)
