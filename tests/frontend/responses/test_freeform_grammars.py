"""Freeform tools are held to their grammar, and calls to the tools that a request allows."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

from frontend import tools
from frontend.grammar import Calls
from frontend.output_events import Call, settle
from frontend.output_parser import OutputParser, Request
from frontend.responses.lark_regex import regex_of
from frontend.responses.schemas import CustomTool, GrammarFormat
from frontend.responses.tools import custom_input, table
from frontend.schemas import Tool
from shared.errors import InvalidRequest
from shared.messages import Grammar, Submit
from tests.frontend.agent_server import AgentServer
from tests.frontend.responses.test_create import TOOLS, call
from tests.frontend.test_tool_grammars import accepts, grammar, outputs
from tests.frontend.tool_outputs import output_format

pytestmark = pytest.mark.mlx

PATCH = r"""
// A patch format in the manner of agents.
start: begin hunk+ end
begin: "*** Begin" LF
end: "*** End" LF?
hunk: add | update
add: "*** Add: " name LF added+
update: "*** Update: " name LF change?
name: /[a-z\/]{1,3}/
added: "+" /[^\n^]{0,3}/ LF -> line
change: ("@@" | "@@ " /[a-c]/) LF change_line~1..2
change_line: ("+" | "-" | " ") /[ab"\\]{0,2}/ LF
%import common.LF
"""
GOOD = [
    "*** Begin\n*** Add: a/b\n+x\n+\n*** End\n",
    '*** Begin\n*** Update: a\n@@ b\n-a"\n+\\\n*** Add: c\n+|$.\n*** End',
]
BAD = ["*** Begin\n*** End\n", "x" + GOOD[0], GOOD[0] + "\n", "*** Begin\n*** Add: A\n+x\n*** End", ""]


def test_the_expression_matches_what_the_grammar_does() -> None:
    expression = re.compile(regex_of(PATCH, "x"))
    for text in GOOD:
        assert expression.fullmatch(text), text
    for text in BAD:
        assert not expression.fullmatch(text), text


@pytest.mark.parametrize(
    ("lark", "good", "bad"),
    [
        ('start: "a".."c" X?\nX.2: /y+/i', ["a", "bYy"], ["d", "ay!"]),
        ('start: [INT "-"] WORD "!"i?\n%import common (INT, WORD)', ["1-ab", "z!"], ["-a", "1"]),
        ('?start: (a | "^$")*\n\na: "."\n  | "\\t"', ["", "^$.", "\t\t"], ["x"]),
        ('start: item | item "," start\nitem: /[a-z]/', ["a", "a,b,c"], ["", ",a", "a,"]),  # it repeats
        ('start: list\nlist: list "+" N | list "-" N | N\nN: /[0-9]/', ["1", "1+2-3"], ["1+", "+1"]),
        ('start: "<" start | start ">" | "x"', ["x", "<<x>", "x>>"], ["<>", "x<"]),
        (
            'start: N+ ";"\nN: "0".."9" "!"\n%ignore " " | /\\t/\n%ignore /#[a-z]*/',
            ["1!;", "1! 2! #ab#c\t;"],
            [" 1!;", "1 !;", "1!2!", "1!!;"],
        ),
        ('start: "x"~2 T~1..3\n%import common.DIGIT -> T', ["xx1", "xx123"], ["x1", "xx1234"]),
    ],
)
def test_larks_notation(lark: str, good: list[str], bad: list[str]) -> None:
    expression = re.compile(regex_of(lark, "x"))
    assert all(expression.fullmatch(text) for text in good)
    assert not any(expression.fullmatch(text) for text in bad)
    if "X.2" not in lark:  # llguidance knows no priorities
        own = Grammar(kind="lark", text=lark)
        assert all(accepts(own, text) for text in good)
        assert not any(accepts(own, text) for text in bad)


@pytest.mark.parametrize(
    ("lark", "words"),
    [
        ('start: "(" start? ")"', "'start' refers to itself within other text, and nesting"),
        ('start: start "a"', "'start' refers to itself without an end"),
        ('start: a\na: b "a" | "x"\nb: a "b"', "'a' refers to itself within"),
        ('start: start* "a"', "'start' refers to itself within"),
        ("start: a", "'a' is not defined"),
        ("begin: /a/", "'start' is not defined"),
        ("start: (", "not closed"),
        ("start: /a/\n%declare B", "'%declare' is not supported"),
        ("start: /a/\n%ignore b", "'b' is not defined"),
        ("start: NAME\n%import other.NAME", "only 'common' can be imported"),
        ("start: /a/x", "flag 'x'"),
        ("start: %json {}", "%json inside a rule"),
        ("start: %lark { start: /a/ }", "%lark inside a rule"),
        ("\n".join(["start: a0"] + [f"a{i}: a{i + 1} a{i + 1}" for i in range(30)] + ['a30: "x"']), "too large"),
    ],
)
def test_what_has_no_expression_is_refused(lark: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        regex_of(lark, "tools[0].format.definition")
    assert caught.value.param == "tools[0].format.definition"


DEFINITIONS: dict[Any, str] = {"lark": PATCH, "regex": r"(ab|c" + r"d)[0-9\n]{1,2}"}


def custom_tool(syntax: Any) -> list[Tool]:
    tool = CustomTool(name="edit", format=GrammarFormat(definition=DEFINITIONS[syntax], syntax=syntax))
    told = table([tool], "auto").functions
    assert told is not None
    return told


def forced(name: str, told: list[Tool]) -> Grammar | None:
    return grammar(output_format(name), Calls(tools=told, is_required=True, is_single=True))


@pytest.fixture(scope="module")
def inputs() -> dict[str, dict[str, list[str]]]:
    """Syntax -> format -> what a random model writes."""
    told = {syntax: custom_tool(syntax) for syntax in DEFINITIONS}
    return {s: outputs({name: forced(name, told[s]) for name in tools.NAMES}, 2) for s in DEFINITIONS}


@pytest.mark.parametrize("name", tools.NAMES)
@pytest.mark.parametrize("syntax", DEFINITIONS)
def test_inputs_match_in_every_format(name: str, syntax: str, inputs: dict[str, dict[str, list[str]]]) -> None:
    told = custom_tool(syntax)
    definition = DEFINITIONS[syntax]
    expression = re.compile(regex_of(definition, "x") if syntax == "lark" else definition)
    chosen = forced(name, told)
    texts = inputs[syntax][name]
    assert texts
    for text in texts:
        (found,) = read_back(name, text, told)
        assert isinstance(found, Call)
        assert expression.fullmatch(custom_input(found.arguments)), found.arguments
        assert not accepts(chosen, text.replace("Begin", "Start") if syntax == "lark" else text.replace("d", "q") + "x")


def read_back(name: str, text: str, told: list[Tool]) -> list[Any]:
    known = {tool.function.name: tool.function.parameters or {} for tool in told}
    parser = OutputParser(Request(output_format=output_format(name), prompt="", tools=known))
    return settle(parser.feed(text) + parser.close())


def submitted(agent: AgentServer) -> Any:
    return agent.engine.wait_for(Submit)[-1]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_of_chat_are_the_only_ones(agent: AgentServer, client: openai.OpenAI, mode: str) -> None:
    agent.reset(call("stop"))
    functions: Any = [{"type": "function", "function": {"name": name}} for name in ("read", "stop", "fly")]
    allowed: Any = {"mode": mode, "tools": [functions[1], functions[2]]}
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Go"}], tools=functions,
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "tool_calls"
    assert '"read"' not in agent.prompts[-1] and '"fly"' in agent.prompts[-1]
    text = submitted(agent).grammar.text
    assert ("stop" in text, "fly" in text, "read" in text) == (True, True, False)


def test_allowed_tools_of_responses_bind_without_being_required(agent: AgentServer, client: openai.OpenAI) -> None:
    agent.reset("Hello")
    choice: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "read"}]}
    client.responses.create(model="default", input="Go", tools=TOOLS, tool_choice=choice)
    text = submitted(agent).grammar.text
    assert "read" in text and "stop" not in text


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"mode": "auto", "tools": [{"type": "function", "function": {"name": "no"}}]}, ".tools[0].function.name"),
        ({"mode": "auto", "tools": []}, ".tools"),
        ({"mode": "maybe", "tools": []}, ".mode"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, ".mode"),
    ],
)
def test_bad_choices_of_chat_are_named(agent: AgentServer, choice: Any, param: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": choice},
    }
    answer = agent.server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"tool_choice.allowed_tools{param}"
