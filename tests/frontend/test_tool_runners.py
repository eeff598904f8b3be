"""Helpers of the SDKs that run a whole tool loop by themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from openai.lib.responses_tool_runner import (
    AsyncRegisteredFunction,
    AsyncResponsesToolRunner,
    RegisteredFunction,
    ResponsesToolRunner,
)

from tests.frontend.agent_server import running

CALLS = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
TURN: list[anthropic.types.beta.BetaMessageParam] = [{"role": "user", "content": "2 + 3?"}]


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tool_runner(tmp_path: Path, stream: bool) -> None:
    seen = []

    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Adds two numbers.

        Args:
            a: one
            b: the other
        """
        seen.append((a, b))
        return str(a + b)

    with running(tmp_path, tool_parser="hermes", reasoning_parser="think") as agent, agent.anthropic() as client:
        agent.reset(CALLS, "It is 5.")
        runner = client.beta.messages.tool_runner(
            model="default", max_tokens=1000, messages=TURN, tools=[add], stream=stream
        )
        if stream:
            texts = ["".join(turn.text_stream) for turn in runner]  # type: ignore[union-attr]  # streams
            assert texts[-1] == "It is 5."
        else:
            assert runner.until_done().content[0].text == "It is 5."  # type: ignore[union-attr]  # a message
        assert seen == [(2, 3)]
        assert "<|im_start|>tool\n5<|im_end|>" in agent.prompts[1]


def test_anthropic_async_tool_runner(tmp_path: Path) -> None:
    @anthropic.beta_async_tool
    async def add(a: int, b: int) -> str:
        """Adds two numbers."""
        return str(a + b)

    async def ask(url: str) -> str:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            runner = client.beta.messages.tool_runner(model="default", max_tokens=1000, messages=TURN, tools=[add])
            message = await runner.until_done()
            return message.content[0].text  # type: ignore[union-attr]  # text

    with running(tmp_path, tool_parser="hermes", reasoning_parser="think") as agent:
        agent.reset(CALLS, "It is 5.")
        assert asyncio.run(ask(agent.server.url)) == "It is 5."


class Add(pydantic.BaseModel):
    """Adds two numbers."""

    a: int
    b: int


def add_tool() -> Any:
    return {"type": "function", "name": "add", "parameters": Add.model_json_schema(), "strict": True}


def add(arguments: dict[str, object]) -> str:
    numbers = Add.model_validate(arguments)
    return str(numbers.a + numbers.b)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_responses_tool_runner(tmp_path: Path, stream: bool) -> None:
    with running(tmp_path, tool_parser="hermes", reasoning_parser="think") as agent:
        agent.reset(CALLS, "It is 5.")
        client = openai.OpenAI(base_url=f"{agent.server.url}/v1", api_key="none", max_retries=0)
        runner = ResponsesToolRunner(functions=[RegisteredFunction(add_tool(), add)])
        with client:
            response = runner.run(client, {"model": "default", "input": "2 + 3?"}, stream=stream)
        assert response.output_text == "It is 5."
        assert "<|im_start|>tool\n5<|im_end|>" in agent.prompts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_openai_async_responses_tool_runner(tmp_path: Path, stream: bool) -> None:
    async def add_async(arguments: dict[str, object]) -> str:
        return add(arguments)

    async def ask(url: str) -> str:
        runner = AsyncResponsesToolRunner(functions=[AsyncRegisteredFunction(add_tool(), add_async)])
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            response = await runner.run(client, {"model": "default", "input": "2 + 3?"}, stream=stream)
            return response.output_text

    with running(tmp_path, tool_parser="hermes", reasoning_parser="think") as agent:
        agent.reset(CALLS, "It is 5.")
        assert asyncio.run(ask(agent.server.url)) == "It is 5."
        assert "<|im_start|>tool\n5<|im_end|>" in agent.prompts[1]
