"""/v1/embeddings through the real processes and the OpenAI SDK, with a tiny Qwen3 embedding checkpoint."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests.support import tiny_embedder, tiny_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

TEXTS = ["What is a tandem?", "A bicycle for two.", "x", "A bicycle for two. " * 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    return tiny_embedder.write(tmp_path_factory.mktemp("embedder") / "tiny")


@pytest.fixture(scope="module")
def embedder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(folder, tmp_path_factory.mktemp("server"), max_num_seqs=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(embedder: Server) -> Iterator[openai.OpenAI]:
    with embedder.openai() as client:
        yield client


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[np.ndarray]:
    """Vectors of TEXTS, not scaled."""
    tokenizer, oracle = tiny_model._tokenizer(), tiny_embedder.Oracle(folder)
    return [oracle.vector(tokenizer.encode(text).ids, "last") for text in TEXTS]


def unit(vector: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vector / np.linalg.norm(vector)
    return scaled


def test_vectors_are_transformers_in_every_form(client: openai.OpenAI, expected: list[np.ndarray]) -> None:
    ids = [tiny_model._tokenizer().encode(text).ids for text in TEXTS]
    answers = [
        client.embeddings.create(model="default", input=TEXTS),  # the SDK asks for base64 and decodes it
        client.embeddings.create(model="default", input=TEXTS, encoding_format="float"),
        client.embeddings.create(model="default", input=ids, encoding_format="float"),
    ]
    for answer in answers:
        assert [entry.index for entry in answer.data] == list(range(len(TEXTS)))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        for entry, vector in zip(answer.data, expected, strict=True):
            np.testing.assert_allclose(entry.embedding, unit(vector), atol=1e-4)
    for single in (TEXTS[0], ids[0]):
        (entry,) = client.embeddings.create(model="default", input=single).data
        np.testing.assert_allclose(entry.embedding, unit(expected[0]), atol=1e-4)
    raw = client.embeddings.with_raw_response.create(model="default", input=TEXTS[0], encoding_format="base64")
    data = raw.http_response.json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(data), "<f4"), unit(expected[0]), atol=1e-4)


def test_dimensions_cut_and_scale_again(client: openai.OpenAI, expected: list[np.ndarray]) -> None:
    (entry,) = client.embeddings.create(model="default", input=TEXTS[1], dimensions=8).data
    np.testing.assert_allclose(entry.embedding, unit(expected[1][:8]), atol=1e-4)
    with pytest.raises(openai.BadRequestError, match="dimensions: 33"):
        client.embeddings.create(model="default", input=TEXTS[1], dimensions=33)


def test_many_at_once_beside_chats(embedder: Server, client: openai.OpenAI, expected: list[np.ndarray]) -> None:
    def chat(seed: int) -> str:
        answer = client.completions.create(
            model="default", prompt=TEXTS[3], max_tokens=24, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    alone = [chat(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(3) as threads:
        chats = [threads.submit(chat, seed) for seed in (1, 2)]
        many = client.embeddings.create(model="default", input=TEXTS * 20)  # in several lots
        assert [chat.result(60) for chat in chats] == alone
    for i, entry in enumerate(many.data):
        np.testing.assert_allclose(entry.embedding, unit(expected[i % len(TEXTS)]), atol=1e-4)


def test_the_async_client(embedder: Server, expected: list[np.ndarray]) -> None:
    async def ask() -> openai.types.CreateEmbeddingResponse:
        async with openai.AsyncOpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as client:
            return await client.embeddings.create(model="default", input=TEXTS[2])

    answer = asyncio.run(ask())
    np.testing.assert_allclose(answer.data[0].embedding, unit(expected[2]), atol=1e-4)


def test_a_client_that_leaves_ends_the_work(embedder: Server, client: openai.OpenAI) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{embedder.url}/v1/embeddings", json={"input": ["y" * 500] * 2000}, timeout=httpx.Timeout(5, read=0.5)
        )
    deadline = time.monotonic() + 30
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while any(embedder.metric(name) for name in names):
        assert time.monotonic() < deadline, "its prompts are still computed"
    assert client.embeddings.create(model="default", input="x").data


def test_bad_inputs_are_400s(client: openai.OpenAI) -> None:
    for given, why in (([], "1 to 2048"), ([""], "no tokens"), ([["x"]], "expected a text"), ([[99999]], "input"),
                       ("z" * 600, "600 tokens")):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=why):
            client.embeddings.create(model="default", input=given)  # type: ignore[arg-type]  # that is what is tested
