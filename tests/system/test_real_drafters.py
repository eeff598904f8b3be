"""The reference drafters of the embedded model through the real processes: acceptance as expected, text unchanged.

`make test-drafters`. The expected rounds were computed in bfloat16, where near ties fall differently, so means over
documents are compared. Prompts are sent as token ids, all documents of an arm together.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import pytest

from tests.support.server import REPOSITORY, Server

FOLDER = Path(os.environ.get("DRAFTERS_FOLDER", REPOSITORY.parent / "shared" / "drafters-smollm2"))
NUM_DOCUMENTS = int(os.environ.get("DRAFTERS_DOCUMENTS", "4"))
NUM_TOKENS = {"dflash-2l": 7, "dflash-4l": 7, "eagle3": 4, "mtp": 2}
TOLERANCE = 0.015 if NUM_DOCUMENTS >= 20 else 0.06  # of the mean over few documents
AT_ONCE = 4
READY_S = 300.0

pytestmark = [
    pytest.mark.system,
    pytest.mark.embedded,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("DRAFTERS_DOCUMENTS" not in os.environ, reason="takes long: make test-drafters"),
    pytest.mark.skipif(not (FOLDER / "held_out.json").exists(), reason="no reference drafters"),
]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "held_out.json").read_text())["documents"][:NUM_DOCUMENTS]


def answers(folder: Path, documents: list[dict[str, Any]], **settings: object) -> tuple[list[str], float]:
    """Each document's prompt continued greedily for as many tokens as it has; and the mean acceptance length.

    Rounds whose draft came too late on a busy machine were no drafts, and do not count.
    """
    server = Server("default", folder, blas_threads=0, **settings).start(wait=False)
    try:
        server.wait_ready(READY_S)
        server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)

        def ask(document: dict[str, Any]) -> str:
            n = document["num_prompt_tokens"]
            body = {
                "model": "default", "prompt": document["token_ids"][:n], "temperature": 0, "ignore_eos": True,
                "max_tokens": len(document["token_ids"]) - n,
            }  # fmt: skip
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=1200)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            texts = list(pool.map(ask, documents))
        num_drafts = server.metric("vllm:spec_decode_num_drafts_total")
        num_accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
        return texts, 1 + num_accepted / num_drafts if num_drafts else 1.0
    finally:
        server.stop()


@pytest.fixture(scope="module")
def plain(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    texts, length = answers(tmp_path_factory.mktemp("plain"), documents, draft_model="none")
    assert length == 1.0
    return texts


@pytest.mark.parametrize("name", NUM_TOKENS)
def test_mean_acceptance_length_and_text_are_the_expected_ones(
    name: str, documents: list[dict[str, Any]], plain: list[str], tmp_path: Path
) -> None:
    k = NUM_TOKENS[name]
    texts, length = answers(tmp_path, documents, draft_model=FOLDER / name, draft_block_size=k, draft_tokens=k)
    assert texts == plain
    rounds = [num_tokens for document in documents for num_tokens in document["committed_per_round"][name]]
    print(f"{name}: mean acceptance length {length:.4f}, expected {mean(rounds):.4f}")
    assert length == pytest.approx(mean(rounds), rel=TOLERANCE)
