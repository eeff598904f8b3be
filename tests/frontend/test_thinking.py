"""What requests say of formats and reasoning, as the engine gets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest

from shared.messages import Submit
from tests.frontend import agent_server
from tests.frontend.agent_server import AgentServer
from tests.frontend.conftest import ids

ASK: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "read", "parameters": SCHEMA}}]
MESSAGES_TOOLS: list[Any] = [{"name": "read", "input_schema": SCHEMA}]


class Number(pydantic.BaseModel):
    n: int


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with agent_server.running(
        tmp_path_factory.mktemp("run"), tool_parser="hermes", reasoning_parser="think"
    ) as running:
        yield running


def asked(
    agent: AgentServer, fields: dict[str, Any], output: str = "</think>{}", path: str = "chat/completions"
) -> Submit:
    agent.reset(output)
    response = agent.server.http.post(f"/v1/{path}", json=ASK | fields)
    assert response.status_code == 200, response.text
    return agent.engine.wait_for(Submit)[0]


def test_parse_of_the_sdks(agent: AgentServer) -> None:
    agent.reset('{"n": 3}')
    with agent.server.openai() as client:
        parsed = client.chat.completions.parse(**ASK, response_format=Number).choices[0].message.parsed
    assert parsed == Number(n=3)
    submit = agent.engine.wait_for(Submit)[0]
    assert submit.grammar is not None and submit.grammar.kind == "json_schema"
    assert json.loads(submit.grammar.text)["properties"]["n"]["type"] == "integer"
    agent.reset('{"n": 4}')
    with agent.anthropic() as other:
        message = other.messages.parse(**ASK, max_tokens=50, output_format=Number)
    assert message.parsed_output == Number(n=4)
    submit = agent.engine.wait_for(Submit)[0]
    assert submit.grammar is not None and submit.grammar.kind == "json_schema" and submit.thinking is None


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a+b"}}, "regex", "a+b"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "lark", 'start: "yes" | "no"'),
        ({"structured_outputs": {"grammar": "start: /x+/"}}, "lark", "start: /x+/"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ],
)
def test_formats_become_grammars(agent: AgentServer, fields: dict[str, Any], kind: str, text: str) -> None:
    for submit in (asked(agent, fields), asked(agent, {"prompt": "x", "messages": None} | fields, path="completions")):
        assert submit.grammar is not None
        assert (submit.grammar.kind, submit.grammar.text) == (kind, text)


def test_ebnf_is_translated(agent: AgentServer) -> None:
    submit = asked(agent, {"structured_outputs": {"grammar": 'root ::= "a" [0-9]+'}})
    assert submit.grammar is not None and "::=" not in submit.grammar.text


def test_forced_calls(agent: AgentServer) -> None:
    named = {"type": "function", "function": {"name": "read"}}
    for choice in ("required", named):
        submit = asked(agent, {"tools": TOOLS, "tool_choice": choice})
        assert submit.grammar is not None and submit.grammar.text.startswith('start: "<tool_call>"')
    submit = asked(agent, {"tools": TOOLS})
    assert submit.grammar is None
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    assert asked(agent, {"tools": strict}).grammar is not None
    for choice in ({"type": "any"}, {"type": "tool", "name": "read"}):
        submit = asked(agent, {"tools": MESSAGES_TOOLS, "tool_choice": choice, "max_tokens": 9}, path="messages")
        assert submit.grammar is not None and submit.grammar.text.startswith('start: "<tool_call>"')


def test_thinking_goes_with_a_grammar_or_a_budget(agent: AgentServer) -> None:
    assert asked(agent, {}).thinking is None
    thinking = asked(agent, {"thinking_budget": 7}).thinking
    assert thinking is not None
    assert (thinking.start, thinking.end, thinking.budget) == ("<think>", "</think>", 7)
    assert (thinking.start_token_ids, thinking.end_token_ids) == (ids("<think>"), ids("</think>"))
    thinking = asked(agent, {"response_format": {"type": "json_object"}}).thinking
    assert thinking is not None and thinking.budget is None
    off = {"response_format": {"type": "json_object"}, "enable_thinking": False}
    assert asked(agent, off, output="{}").thinking is None, "the template has closed the reasoning"


def test_markers_of_the_request(agent: AgentServer) -> None:
    agent.reset("[T]hm[/T]yes")
    body = ASK | {"thinking_start_token": "[T]", "thinking_end_token": "[/T]", "thinking_budget": 5}
    message = agent.server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    thinking = agent.engine.wait_for(Submit)[0].thinking
    assert thinking is not None and (thinking.start, thinking.end) == ("[T]", "[/T]")


def test_budgets_of_anthropics_api(agent: AgentServer) -> None:
    wish = {"thinking": {"type": "enabled", "budget_tokens": 30}, "max_tokens": 50}
    thinking = asked(agent, wish, path="messages").thinking
    assert thinking is not None and thinking.budget == 30
    assert asked(agent, {"max_tokens": 50}, path="messages").thinking is None


def test_effort_reaches_a_template_that_knows_it(agent: AgentServer, client: openai.OpenAI) -> None:
    for effort, told in (("low", "(low)"), ("xhigh", "(high)"), ("minimal", "(low)")):
        agent.reset("x")
        client.chat.completions.create(**ASK, reasoning_effort=effort)  # type: ignore[arg-type]  # a test's own values
        assert told in agent.prompts[0]


@pytest.fixture
def client(agent: AgentServer) -> Iterator[openai.OpenAI]:
    with agent.server.openai() as sdk:
        yield sdk


def test_effort_is_a_budget_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    template = agent_server.TEMPLATE.replace("reasoning_effort", "other_effort")
    with agent_server.running(
        tmp_path_factory.mktemp("run"), template=template, reasoning_parser="think", enable_thinking="false"
    ) as agent:
        budgets = {}
        for effort in ("minimal", "low", "medium", "high"):
            thinking = asked(agent, {"reasoning_effort": effort}).thinking
            budgets[effort] = None if thinking is None else thinking.budget
        assert budgets == {"minimal": 256, "low": 1024, "medium": 8192, "high": None}
        asked(agent, {"reasoning_effort": "none"})
        assert agent.prompts[0].endswith("</think>\n\n"), "off"
        asked(agent, {})
        assert agent.prompts[0].endswith("</think>\n\n"), "off by the server's setting"
        asked(agent, {"enable_thinking": True})
        assert not agent.prompts[0].endswith("</think>\n\n")


def test_models_without_reasoning_refuse_effort(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with agent_server.running(tmp_path_factory.mktemp("run"), template=plain) as agent:
        for fields in ({"reasoning_effort": "low"}, {"thinking_budget": 4}):
            response = agent.server.http.post("/v1/chat/completions", json=ASK | fields)
            assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(fields)))


def test_anthropic_sdk_forces_a_tool(agent: AgentServer) -> None:
    agent.reset('<tool_call>\n{"name": "read", "arguments": {"n": 1}}\n</tool_call>')
    with agent.anthropic() as client:
        choice: anthropic.types.ToolChoiceToolParam = {"type": "tool", "name": "read"}
        message = client.messages.create(**ASK, max_tokens=99, tools=MESSAGES_TOOLS, tool_choice=choice)
    (block,) = message.content
    assert block.type == "tool_use" and block.input == {"n": 1}
