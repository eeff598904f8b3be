"""The official SDKs' helpers, sync and async, against the real processes with a tiny random model.

Grammars hold the model to a call or an object, so that its random choice can be parsed. At temperature 0
every helper has to give what the others give. OpenAI's ResponsesToolRunner refuses forced calls: there the model has
the choice of a call or an object, and with this seed it takes the one first and the other later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest
from openai.lib.responses_tool_runner import (
    AsyncRegisteredFunction,
    AsyncResponsesToolRunner,
    RegisteredFunction,
    ResponsesToolRunner,
    ToolRunnerError,
)

from tests.support import tiny_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]


class Move(pydantic.BaseModel):
    """Moves a piece."""

    piece: Literal["king", "queen", "pawn"]
    takes: bool


TURNS: Any = [{"role": "user", "content": "Move"}]
FIXED: Any = {"model": "default", "temperature": 0}
CLAUDE: Any = {"model": "default", "extra_body": {"temperature": 0}}  # the SDK has no such parameter any more
CALL: Any = {"type": "function", "name": "Move"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny", seed=1, template=tiny_model.TOOLS_TEMPLATE)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(model, tmp_path_factory.mktemp("server"), max_num_seqs=8, tool_parser="hermes") as running:
        yield running


@pytest.fixture(scope="module")
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai(timeout=60) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


def async_gpt(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def async_claude(server: Server) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def test_chat_parse_and_stream(server: Server, gpt: openai.OpenAI) -> None:
    wish: Any = {**FIXED, "messages": TURNS, "max_tokens": 200}
    parsed = gpt.chat.completions.parse(**wish, response_format=Move).choices[0].message.parsed
    assert isinstance(parsed, Move)
    with gpt.chat.completions.stream(**wish, response_format=Move) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message
    assert final.parsed == parsed and final.content == "".join(deltas)
    tool: Any = openai.pydantic_function_tool(Move)
    forced: Any = {**wish, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = gpt.chat.completions.parse(**forced).choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Move)

    async def ask() -> tuple[Any, Any]:
        async with async_gpt(server) as sdk:
            whole = await sdk.chat.completions.parse(**wish, response_format=Move)
            async with sdk.chat.completions.stream(**forced) as stream:
                return whole.choices[0].message.parsed, await stream.get_final_completion()

    whole, streamed = asyncio.run(ask())
    assert whole == parsed
    (again,) = streamed.choices[0].message.tool_calls
    assert again.function.parsed_arguments == call.function.parsed_arguments


def test_responses_parse_and_stream(server: Server, gpt: openai.OpenAI) -> None:
    wish: Any = {**FIXED, "input": "Move", "max_output_tokens": 200}
    parsed = gpt.responses.parse(**wish, text_format=Move).output_parsed
    assert isinstance(parsed, Move)
    with gpt.responses.stream(**wish, text_format=Move) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed == parsed and final.output_text == "".join(deltas)
    forced: Any = {**wish, "tools": [openai.pydantic_function_tool(Move)["function"] | {"type": "function"}]}
    forced |= {"tool_choice": CALL, "parallel_tool_calls": False}
    (call,) = gpt.responses.parse(**forced).output
    assert call.type == "function_call" and Move.model_validate_json(call.arguments)

    async def ask() -> tuple[Any, Any]:
        async with async_gpt(server) as sdk:
            whole = await sdk.responses.parse(**wish, text_format=Move)
            async with sdk.responses.stream(**forced) as stream:
                return whole.output_parsed, await stream.get_final_response()

    whole, streamed = asyncio.run(ask())
    assert whole == parsed and streamed.output[0].arguments == call.arguments


def test_responses_in_the_background(server: Server, gpt: openai.OpenAI) -> None:
    wish: Any = {"format": {"type": "json_schema", "name": "Move", "schema": Move.model_json_schema()}}  # it completes
    begun = gpt.responses.create(**FIXED, input="Go", background=True, text=wish)
    with gpt.responses.stream(response_id=begun.id) as stream:
        final = stream.get_final_response()
    assert final.id == begun.id and Move.model_validate_json(final.output_text)
    assert gpt.responses.retrieve(begun.id).output_text == final.output_text
    (item,) = gpt.responses.input_items.list(begun.id)
    assert item.type == "message" and item.content[0].text == "Go"  # type: ignore[union-attr]  # a text
    gpt.responses.delete(begun.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(begun.id)

    async def ask() -> None:
        async with async_gpt(server) as sdk:
            begun = await sdk.responses.create(model="default", input="Go", background=True, max_output_tokens=4)
            assert [item.type async for item in sdk.responses.input_items.list(begun.id)] == ["message"]
            counted = await sdk.responses.input_tokens.count(model="default", input="Go")
            assert counted.input_tokens == final.usage.input_tokens  # type: ignore[union-attr]  # it has ended
            await sdk.responses.delete(begun.id)
            with pytest.raises(openai.NotFoundError):
                await sdk.responses.input_items.list(begun.id)

    asyncio.run(ask())


def test_messages_parse_stream_and_count(server: Server, claude: anthropic.Anthropic) -> None:
    wish: Any = {**CLAUDE, "messages": TURNS, "max_tokens": 200}
    whole = claude.messages.parse(**wish, output_format=Move)
    assert isinstance(whole.parsed_output, Move)
    with claude.messages.stream(**wish, output_format=Move) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.parsed_output == whole.parsed_output == Move.model_validate_json(text)
    assert claude.messages.count_tokens(model="default", messages=TURNS).input_tokens == final.usage.input_tokens

    async def ask() -> tuple[Any, Any, int]:
        async with async_claude(server) as sdk:
            parsed = await sdk.messages.parse(**wish, output_format=Move)
            async with sdk.messages.stream(**wish, output_format=Move) as stream:
                final = await stream.get_final_message()
            counted = await sdk.messages.count_tokens(model="default", messages=TURNS)
            return parsed.parsed_output, final.parsed_output, counted.input_tokens

    assert asyncio.run(ask()) == (whole.parsed_output, whole.parsed_output, final.usage.input_tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_beta_tool_runner(server: Server, claude: anthropic.Anthropic, stream: bool) -> None:
    moves: list[str] = []
    wish: Any = {**CLAUDE, "messages": TURNS, "max_tokens": 200, "max_iterations": 2, "stream": stream}
    wish["tool_choice"] = {"type": "tool", "name": "move", "disable_parallel_tool_use": True}

    @anthropic.beta_tool
    def move(piece: Literal["king", "queen", "pawn"]) -> str:
        """Moves a piece."""
        moves.append(piece)
        return "done"

    last = claude.beta.messages.tool_runner(**wish, tools=[move]).until_done()
    assert last.stop_reason == "tool_use" and len(moves) >= 1 and set(moves) <= {"king", "queen", "pawn"}
    alone = claude.messages.count_tokens(model="default", messages=TURNS, tools=[move.to_dict()])  # type: ignore[list-item]
    num_prompt_tokens = last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0)
    assert num_prompt_tokens > alone.input_tokens, "the result did not go back"
    expected = list(moves)

    async def ask() -> Any:
        @anthropic.beta_async_tool(name="move")
        async def move_async(piece: Literal["king", "queen", "pawn"]) -> str:
            """Moves a piece."""
            moves.append(piece)
            return "done"

        async with async_claude(server) as sdk:
            return await sdk.beta.messages.tool_runner(**wish, tools=[move_async]).until_done()

    assert asyncio.run(ask()).stop_reason == "tool_use"
    assert moves == expected * 2


class Done(pydantic.BaseModel):
    ok: bool


def test_responses_tool_runner(server: Server, gpt: openai.OpenAI) -> None:
    moves: list[dict[str, object]] = []
    closed = {"additionalProperties": False}
    schema = {"type": "object", "properties": {"piece": {"enum": ["king", "queen"]}}, "required": ["piece"], **closed}
    tool: Any = {"type": "function", "name": "move", "strict": True, "parameters": schema}
    answer = {"type": "json_schema", "name": "done", "schema": Done.model_json_schema() | closed}

    def move(arguments: dict[str, object]) -> str:
        moves.append(arguments)
        return "done"

    async def move_async(arguments: dict[str, object]) -> str:
        return move(arguments)

    def wish(number: int) -> Any:
        return {**FIXED, "input": f"Move {number}", "text": {"format": answer}, "parallel_tool_calls": False}

    def run(number: int, stream: bool) -> Any:
        runner = ResponsesToolRunner(functions=[RegisteredFunction(tool, move)])
        return runner.run(gpt, wish(number), stream=stream, max_steps=8)

    async def run_async(number: int, stream: bool) -> Any:
        runner = AsyncResponsesToolRunner(functions=[AsyncRegisteredFunction(tool, move_async)])
        async with async_gpt(server) as sdk:
            return await runner.run(sdk, wish(number), stream=stream, max_steps=8)

    for number in range(6):  # now and then it never comes to an answer
        moves.clear()
        with contextlib.suppress(ToolRunnerError):
            last = run(number, stream=False)
            if moves:
                break
    else:
        raise AssertionError("no run had calls and an answer")
    expected = list(moves)
    assert all(set(made) == {"piece"} and made["piece"] in ("king", "queen") for made in expected)
    assert last.status == "completed" and Done.model_validate_json(last.output_text)
    alone = gpt.responses.input_tokens.count(model="default", input=f"Move {number}", tools=[tool])
    assert last.usage.input_tokens > alone.input_tokens, "the results did not go back"
    for again in (
        run(number, stream=True),
        asyncio.run(run_async(number, False)),
        asyncio.run(run_async(number, True)),
    ):
        assert again.output_text == last.output_text
    assert moves == expected * 4


def test_models_and_embeddings(server: Server, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """A chat model embeds nothing; test_embeddings.py drives the vectors."""
    (card,) = gpt.models.list().data
    assert gpt.models.retrieve(card.id).id == card.id == claude.models.list().data[0].id
    assert claude.models.retrieve(card.id).type == "model"
    with pytest.raises(openai.BadRequestError, match="embed"):
        gpt.embeddings.create(model="default", input="x")

    async def ask() -> tuple[list[str], list[str]]:
        async with async_gpt(server) as sdk, async_claude(server) as other:
            with pytest.raises(openai.BadRequestError, match="embed"):
                await sdk.embeddings.create(model="default", input="x")
            return [m.id async for m in sdk.models.list()], [m.id async for m in other.models.list()]

    assert asyncio.run(ask()) == ([card.id], [card.id])
