"""The Responses and Messages APIs through the official SDKs, against the real processes with a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support.server import Server
from tests.support.stream import hold, wait_in_engine

pytestmark = [pytest.mark.system, pytest.mark.mlx]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai(timeout=60) as sdk:
        yield sdk


def test_a_conversation_survives_the_frontends_death(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(input="Hello there, how are you today? Tell me all of it.", **options)
    assert first.usage.output_tokens > 0
    expected = client.responses.create(input="And?", previous_response_id=first.id, **options)
    frontend = server.worker("frontend")
    frontend.kill()
    frontend.wait(10)
    server.wait_ready()
    again = client.responses.create(input="And?", previous_response_id=first.id, **options)
    assert again.output_text == expected.output_text
    assert again.usage.input_tokens == expected.usage.input_tokens > first.usage.total_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.input_items.list(again.id, order="asc").data[0].type == "message"


def test_streams_say_what_whole_answers_say(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "default", "input": "Say it", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**options)
    events = list(client.responses.create(stream=True, **options))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == f"response.{whole.status}"
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens

    async def ask() -> tuple[Any, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as sdk:
            made = await sdk.responses.create(**options)
            stream = await sdk.responses.create(stream=True, **options)
            return made, "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])

    made, streamed = asyncio.run(ask())
    assert made.output_text == streamed == whole.output_text


# No output of it is shorter than 200 tokens, each of them a byte: it ends there or at the end of the context.
NUMBERS = {"type": "array", "items": {"enum": [0, 1]}, "minItems": 100, "maxItems": 100}
LONG: dict[str, Any] = {
    "model": "default",
    "input": "Go",
    "text": {"format": {"type": "json_schema", "name": "long", "schema": {"type": "object", "required": ["n"],
                        "properties": {"n": NUMBERS}, "additionalProperties": False}}},
}  # fmt: skip


def num_generated(server: Server) -> float:
    return server.metric("vllm:generation_tokens_total")


def test_cancelling_stops_the_generation(server: Server, client: openai.OpenAI) -> None:
    """The target stands still while the response is cancelled, so that it cannot have ended before."""
    whole = client.responses.create(**LONG)
    assert whole.usage is not None and whole.usage.output_tokens > 200
    before = num_generated(server)

    target = hold(server)
    try:
        begun = client.responses.create(**LONG, background=True)
        wait_in_engine(server, 1)
        cancelled = client.responses.cancel(begun.id)
    finally:
        target.resume()
    assert cancelled.status == "cancelled"
    wait_in_engine(server, 0)
    assert num_generated(server) - before < 50
    assert client.responses.retrieve(begun.id).status == "cancelled"

    async def cancel() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as sdk:
            begun = await sdk.responses.create(**LONG, background=True)
            await asyncio.to_thread(wait_in_engine, server, 1)
            return begun.id, (await sdk.responses.cancel(begun.id)).status or ""

    target = hold(server)
    try:
        response_id, status = asyncio.run(cancel())
    finally:
        target.resume()
    assert status == "cancelled"
    wait_in_engine(server, 0)
    assert num_generated(server) - before < 100
    assert client.responses.retrieve(response_id).status == "cancelled"


def test_compaction_and_counts(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="default", input="Hi")
    made = client.responses.create(model="default", input="Hi", max_output_tokens=3)
    assert counted.input_tokens == made.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="default", input="x" * 3000)
    assert caught.value.code == "context_length_exceeded"
    short = client.responses.create(
        model="default", input=[{"role": "user", "content": "x" * 90}] * 9, truncation="auto"
    )
    assert short.usage.input_tokens < 512


def test_anthropic_streams_from_the_real_processes(server: Server) -> None:
    with (
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as sdk,
        sdk.messages.stream(model="default", max_tokens=8, messages=[{"role": "user", "content": "Hi"}]) as stream,
    ):
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(block.text for block in message.content if block.type == "text") == text
    assert message.usage.output_tokens <= 8
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as sdk:
        (card,) = sdk.models.list().data
        assert card.type == "model"
        assert sdk.models.retrieve(card.id).id == card.id
