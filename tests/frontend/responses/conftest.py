from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.frontend.agent_server import AgentServer, running


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with running(tmp_path_factory.mktemp("run"), tool_parser="hermes", reasoning_parser="think") as agent:
        yield agent


@pytest.fixture
def client(agent: AgentServer) -> Iterator[openai.OpenAI]:
    agent.reset()
    with agent.server.openai() as sdk:
        yield sdk
