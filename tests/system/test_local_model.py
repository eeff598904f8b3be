"""A model in this process gives the tokens that the real processes give, with and without drafts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem import LocalModel, Result, generate, load
from tests.support import tiny_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tandem?"}]
TEXT = "Two wheels, two riders, and"
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
SEEDED = {
    "temperature": 0.9, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "seed": 11, "max_tokens": 24,
    "logit_bias": {65: 2.0}, "min_tokens": 8,
}  # fmt: skip

PROMPTS: dict[str, Any] = {
    "chat": MESSAGES, "text": TEXT, "tokens": [72, 101, 108, 7], "long": "A text that takes chunks of its own. " * 6,
}  # fmt: skip
REQUESTS = {
    f"{prompt}-{way}": (PROMPTS[prompt], options)
    for way, options in (("greedy", GREEDY), ("seeded", SEEDED))
    for prompt in PROMPTS
}
Answer = tuple[str, list[bytes], str | None]
"""(text, each token's bytes, finish reason)"""


@pytest.fixture(scope="module")
def drafter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_eagle3(tmp_path_factory.mktemp("drafter") / "eagle3", model)


@pytest.fixture(scope="module")
def drafted_server(model: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        model, tmp_path_factory.mktemp("server"), max_num_seqs=8, draft_model=drafter, draft_tokens=3
    ) as running:
        running.wait_for(
            lambda: httpx.get(f"{running.url}/health", timeout=5).json()["drafter"] == "ready", "drafting", 60.0
        )
        yield running


@pytest.fixture(scope="module", params=["none", "ngram", "eagle3"])
def local(request: pytest.FixtureRequest, model: Path, drafter: Path) -> Iterator[LocalModel]:
    name = str(drafter) if request.param == "eagle3" else request.param
    with load(str(model), name, dtype="float32", draft_tokens=0 if name == "none" else 3, blas_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def answers(drafted_server: Server) -> dict[str, Answer]:
    """The server's, to all requests at once: each is asked once, since it is the slower side."""
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        found = pool.map(lambda request: served(drafted_server, *request), REQUESTS.values())
        return dict(zip(REQUESTS, found, strict=True))


def served(server: Server, prompt: Any, options: dict[str, Any]) -> Answer:
    fields = {**options, "model": "default"}
    fields |= {"logit_bias": {str(k): v for k, v in options.get("logit_bias", {}).items()}}
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        fields |= {"messages": prompt, "logprobs": True}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=fields, timeout=60)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        tokens = [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
        return choice["message"]["content"], tokens, choice["finish_reason"]
    fields |= {"prompt": prompt, "logprobs": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], [_bytes(token) for token in choice["logprobs"]["tokens"]], choice["finish_reason"]


def _bytes(token: str) -> bytes:
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def in_process(model: LocalModel, result: Result) -> Answer:
    pieces = model._service.pieces
    return result.text, [pieces.bytes_of(token) for token in result.token_ids], result.finish_reason


@pytest.mark.parametrize("name", REQUESTS)
def test_tokens_are_the_servers(local: LocalModel, answers: dict[str, Answer], name: str) -> None:
    prompt, options = REQUESTS[name]
    assert in_process(local, generate(local, prompt, **options)) == answers[name]
    assert len(set(answers[name][1])) > 5, "the model repeats itself"


def test_prompts_of_one_batch_give_what_each_gives_alone(local: LocalModel, answers: dict[str, Answer]) -> None:
    greedy = {name: prompt for name, (prompt, options) in REQUESTS.items() if options is GREEDY}
    together = generate(local, list(greedy.values()), **GREEDY)
    assert [in_process(local, result) for result in together] == [answers[name] for name in greedy]


def test_drafts_are_made_and_counted(local: LocalModel) -> None:
    stats = generate(local, "abcabcabcabcabcabcabcabc", **GREEDY).stats
    assert stats.num_prompt_tokens == 24 and stats.num_output_tokens == 24
    if local.drafter is None:
        assert stats.num_draft_tokens == 0 and stats.acceptance_rate is None
    elif local.drafter == "eagle3":
        assert stats.num_draft_tokens > 0 and stats.acceptance_rate is not None
        assert 0 <= stats.num_accepted_tokens <= stats.num_draft_tokens
