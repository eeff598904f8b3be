"""What a response has to match reaches the engine as a grammar."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from shared.messages import Submit
from tests.frontend.agent_server import AgentServer
from tests.frontend.responses.test_create import TOOLS, call


class Person(BaseModel):
    name: str
    age: int


class Read(BaseModel):
    path: str


def grammar_of(agent: AgentServer) -> Any:
    return agent.engine.wait_for(Submit)[-1].grammar


def test_parse_helper(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset('<think>Who?</think>{"name": "Ada", "age": 36}')
    response = client.responses.parse(model="default", input="Who?", text_format=Person)
    assert response.output_parsed == Person(name="Ada", age=36)
    assert response.text.format.type == "json_schema"
    grammar = grammar_of(agent)
    assert grammar.kind == "json_schema"
    assert set(json.loads(grammar.text)["properties"]) == {"name", "age"}


def test_stream_helper_parses(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset('{"name": "Ada", "age": 36}')
    with client.responses.stream(model="default", input="Who?", text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == Person(name="Ada", age=36)


def test_strict_tools_of_the_sdk(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset(call("Read", path="x"))
    tool = openai.pydantic_function_tool(Read)
    response = client.responses.parse(model="default", input="Go", tools=[tool])
    assert response.output[0].parsed_arguments == Read(path="x")
    assert grammar_of(agent).kind == "lark"


def test_json_object(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("{}")
    client.responses.create(model="default", input="Go", text={"format": {"type": "json_object"}})
    assert grammar_of(agent).kind == "json_object"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["read", "stop", "note", "local_shell"]),
        ({"type": "function", "name": "stop"}, ["stop"]),
        ({"type": "custom", "name": "note"}, ["note"]),
        ({"type": "local_shell"}, ["local_shell"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "read"}]}, ["read"]),
    ],
)
def test_forced_calls(agent: AgentServer, client: openai.OpenAI, choice: Any, names: list[str]) -> None:
    agent.reset(call("stop"))
    tools = [*TOOLS, {"type": "custom", "name": "note"}, {"type": "local_shell"}]
    client.responses.create(model="default", input="Go", tools=tools, tool_choice=choice)
    text = grammar_of(agent).text
    assert [name for name in ("read", "stop", "note", "local_shell") if name in text] == names


def test_nothing_is_constrained_without_need(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("Hello")
    client.responses.create(model="default", input="Go", tools=TOOLS, tool_choice="auto")
    assert grammar_of(agent) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wrong"}}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ],
)
def test_what_cannot_be_is_named(agent: AgentServer, fields: dict[str, Any], param: str) -> None:
    response = agent.server.http.post("/v1/responses", json={"input": "Go"} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
