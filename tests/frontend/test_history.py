"""Calls of former turns whose arguments are not what a chat template expects."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from frontend.history import arguments_of
from tests.frontend.agent_server import AgentServer, running

# As Qwen3-Coder's, MiniMax's and GLM's templates do it: member by member, with `tojson` for what is no string.
WALKS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content == 'refuse' %}{{ raise_exception('no such words') }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }}>{% for key, value in c.function.arguments | items %}"
    "<{{ key }}>{{ value if value is string else value | tojson }}{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
)
BROKEN = ['{"path": "a', "read a.py", "[1, 2]", '"a"', "null", '{"path": NaN}']


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with running(tmp_path_factory.mktemp("run"), template=WALKS, tool_parser="qwen3_coder") as agent:
        yield agent


def ask(agent: AgentServer, arguments: str, *, route: str = "chat/completions", text: str = "Go") -> tuple[int, dict]:
    call = {"id": "call_7", "type": "function", "function": {"name": "read", "arguments": arguments}}
    turns = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_7", "content": "bad arguments"},
    ]
    items = [
        {"role": "user", "content": text},
        {"type": "function_call", "call_id": "call_7", "name": "read", "arguments": arguments},
        {"type": "function_call_output", "call_id": "call_7", "output": "bad arguments"},
    ]
    agent.reset("done")
    body = {"messages": turns} if route == "chat/completions" else {"input": items}
    answer = agent.server.http.post(f"/v1/{route}", json=body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("route", ["chat/completions", "responses"])
@pytest.mark.parametrize("arguments", BROKEN)
def test_a_template_that_walks_the_members_gets_a_400_that_names_the_call(
    agent: AgentServer, route: str, arguments: str
) -> None:
    status, answer = ask(agent, arguments, route=route)
    assert status == 400
    error = answer["error"]
    assert error["param"] == ("messages" if route == "chat/completions" else "input")
    assert "'call_7'" in error["message"] and "'read'" in error["message"] and "not a JSON object" in error["message"]


def test_another_reason_of_the_template_is_not_blamed_on_the_arguments(agent: AgentServer) -> None:
    status, answer = ask(agent, BROKEN[0], text="refuse")
    assert status == 400
    assert "no such words" in answer["error"]["message"]
    assert "call_7" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"path": "a.py"}', "<call read><path>a.py"),
        ("", "<call read><|im_end|>"),
        (" \n", "<call read><|im_end|>"),
        ('{"limit": 1e999, "lines": [-1e999, {"a": %s}]}' % ("1" * 5000),
         '<call read><limit>1e999<lines>[-1e999, {"a": %s}]' % ("1" * 5000)),
    ],
)  # fmt: skip
def test_arguments_reach_the_template(agent: AgentServer, arguments: str, written: str) -> None:
    assert ask(agent, arguments)[0] == 200
    assert written in agent.prompts[0]


def test_what_is_no_json_stays_text() -> None:
    assert arguments_of('{"a": ') == '{"a": '
    assert arguments_of("[" * 100_000) == "[" * 100_000
    assert arguments_of(json.dumps({"a": [1, None]})) == {"a": [1, None]}
