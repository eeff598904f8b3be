"""The reference drafters of the embedded model through the real processes: acceptance as expected, text unchanged.

`make test-drafters`. The documents were written in bfloat16. Where two tokens are nearly equal, a server that computes
in float32 goes on with another text, on which a drafter is better or worse. So documents are played in segments between
such places. Each begins at a round's anchor, so that its rounds are those of the file. Within a segment the document
is the plain greedy text. Prompts are sent as token ids, all segments of an arm together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from shared import config, tokenizer
from shared.model_files import resolve
from tests.support.server import REPOSITORY, Server

FOLDER = Path(os.environ.get("DRAFTERS_FOLDER", REPOSITORY.parent / "shared" / "drafters-smollm2"))
NUM_DOCUMENTS = int(os.environ.get("DRAFTERS_DOCUMENTS", "4"))
NUM_TOKENS = {"dflash-2l": 7, "dflash-4l": 7, "eagle3": 4, "mtp": 2}
TOLERANCE = 0.015 if NUM_DOCUMENTS >= 20 else 0.06  # of the mean over few documents
MIN_ROUNDS = 8  # of a segment
MARGIN = 0.002  # nats; a server's steps and one long forward differ by less
AT_ONCE = 4
READY_S = 300.0

pytestmark = [
    pytest.mark.system,
    pytest.mark.embedded,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("DRAFTERS_DOCUMENTS" not in os.environ, reason="takes long: make test-drafters"),
    pytest.mark.skipif(not (FOLDER / "held_out.json").exists(), reason="no reference drafters"),
]


class Segment(NamedTuple):
    prompt: list[int]
    answer: list[int]  # the first round's anchor and what the rounds commit
    rounds: list[int]  # tokens committed by each

    @property
    def drafted_rounds(self) -> list[int]:
        """A last round of one token is a step without drafts: there is nothing left to draft."""
        return self.rounds[:-1] if self.rounds[-1] == 1 else self.rounds


def segments(document: dict[str, Any], name: str, unsafe: set[int]) -> list[Segment]:
    """The longest runs of whole rounds whose tokens, the first anchor's included, are safe."""
    ids, anchor = document["token_ids"], document["num_prompt_tokens"]
    found, first, rounds = [], anchor, list[int]()
    for committed in [*document["committed_per_round"][name], 0]:  # 0: the end
        end = anchor + committed
        if committed and unsafe.isdisjoint(range(anchor + bool(rounds), end + 1)):
            first = first if rounds else anchor
            rounds.append(committed)
        else:
            if len(rounds) >= MIN_ROUNDS:
                found.append(Segment(ids[:first], ids[first : anchor + 1], rounds))
            rounds = []
        anchor = end
    return found


@pytest.fixture(scope="module")
def documents() -> list[tuple[dict[str, Any], set[int]]]:
    """Each with its unsafe positions."""
    from tests.support import replay  # imports MLX

    target = replay.Target(replay.MODEL_FILE)
    return [(d, replay.unsafe_positions(target, d, MARGIN)) for d in replay.load_documents(NUM_DOCUMENTS)]


@pytest.fixture(scope="module")
def text() -> Any:
    """Token ids -> text."""
    settings = config.load()
    return tokenizer.load(resolve("default", settings)).tokenizer.decode


def answers(folder: Path, played: Sequence[Segment], **settings: object) -> tuple[list[str], float]:
    """The server's greedy answers to all prompts, and the mean acceptance length of rounds with drafts (1 without any).

    A round whose draft came too late on a busy machine was no draft, and does not count.
    """
    server = Server("default", folder, **settings).start(wait=False)
    try:
        server.wait_ready(READY_S)
        server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)

        def ask(segment: Segment) -> str:
            body = {"model": "default", "prompt": segment.prompt, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(
                f"{server.url}/v1/completions", json=body | {"max_tokens": len(segment.answer)}, timeout=1200
            )
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            texts = list(pool.map(ask, played))
        num_drafts = server.metric("vllm:spec_decode_num_drafts_total")
        num_accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
        return texts, 1 + num_accepted / num_drafts if num_drafts else 1.0
    finally:
        server.stop()


def test_plain_decoding_goes_on_with_the_documents(documents: Any, text: Any, tmp_path: Path) -> None:
    played = [s for document, unsafe in documents for s in segments(document, "dflash-2l", unsafe)]
    texts, length = answers(tmp_path, played, draft_model="none")
    assert texts == [text(s.answer) for s in played]
    assert length == 1.0


@pytest.mark.parametrize("name", NUM_TOKENS)
def test_mean_acceptance_length_and_text_are_the_expected_ones(
    name: str, documents: Any, text: Any, tmp_path: Path
) -> None:
    k = NUM_TOKENS[name]
    played = [s for document, unsafe in documents for s in segments(document, name, unsafe)]
    all_rounds = sum(len(document["committed_per_round"][name]) for document, _ in documents)
    rounds = [committed for s in played for committed in s.drafted_rounds]
    assert len(rounds) > 0.7 * all_rounds, "most of the documents' rounds are in the segments"
    texts, length = answers(tmp_path, played, draft_model=FOLDER / name, draft_block_size=k, draft_tokens=k)
    assert texts == [text(s.answer) for s in played]
    expected = sum(rounds) / len(rounds)
    print(f"{name}: mean acceptance length {length:.4f}, expected {expected:.4f} ({len(rounds)} rounds)")
    assert length == pytest.approx(expected, rel=TOLERANCE)
