"""Codex's freeform tools with their grammars through the real processes: a random model has to write what they allow.

llguidance reads the Lark grammar itself to judge what was written; the server held the model to a regular expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from shared.messages import Grammar
from tests.frontend.test_tool_grammars import accepts
from tests.support import tiny_model
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

# The form of Codex's patches, with bounds where it has none: a random model would not come to an end in 512 positions.
PATCH = r"""
start: begin_patch hunk~1..2 end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line~1..2
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.{1,4})/
add_line: "+" /(.{0,4})/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)~1..2 eof_line?
change_context: ("@@" | "@@ " /(.{1,4})/) LF
change_line: ("+" | "-" | " ") /(.{0,4})/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
LIST = 'start: "[" items "]"\nitems: NAME | items "," NAME\nNAME: /[a-c]{1,2}/\n%ignore " "'
NESTED = 'start: "(" start? ")"'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tiny_model.write(tmp_path_factory.mktemp("model") / "tiny", template=tiny_model.TOOLS_TEMPLATE)
    with Server(folder, tmp_path_factory.mktemp("server"), max_num_seqs=8, tool_parser="hermes") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.openai(timeout=60) as sdk:
        yield sdk


def asked(definition: str, syntax: str = "lark") -> dict[str, Any]:
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    return {
        "model": "default",
        "store": False,
        "tools": [{"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": form}],
        "tool_choice": {"type": "custom", "name": "apply_patch"},
        "parallel_tool_calls": False,
    }


def written(client: openai.OpenAI, body: dict[str, Any], items: list[Any]) -> Any:
    """The call, as a stream gives it; None where the context ended before it."""
    with client.responses.create(**body, input=items, stream=True) as stream:
        events = list(stream)
    deltas = "".join(e.delta for e in events if e.type == "response.custom_tool_call_input.delta")
    if events[-1].type == "response.incomplete":
        return None
    assert events[-1].type == "response.completed", events[-1]
    (call,) = events[-1].response.output
    assert call.type == "custom_tool_call" and call.name == "apply_patch"
    assert call.input == deltas
    return call


@pytest.mark.parametrize("definition", [PATCH, LIST])
def test_a_tool_loop_in_which_every_patch_matches_its_grammar(client: openai.OpenAI, definition: str) -> None:
    num_whole = 0
    for _ in range(3):
        items: list[Any] = [{"role": "user", "content": "Edit"}]
        call = written(client, asked(definition), items)
        if call is None:
            continue
        num_whole += 1
        assert accepts(Grammar(kind="lark", text=definition), call.input.rstrip(" ")), call.input
        items += [call.to_dict(), {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done."}]
        items += [{"role": "user", "content": "Again"}]
        again = written(client, asked(LIST), items)
        if again is not None:
            assert accepts(Grammar(kind="lark", text=LIST), again.input.rstrip(" ")), again.input
    assert num_whole, "no call came to its end"


def test_a_regular_expression_holds_too(client: openai.OpenAI) -> None:
    call = written(client, asked('(ab|"[c-e]"\n){1,3}', "regex"), [{"role": "user", "content": "Edit"}])
    assert accepts(Grammar(kind="regex", text='(ab|"[c-e]"\n){1,3}'), call.input)


@pytest.mark.parametrize(
    ("definition", "reason"), [(NESTED, "nesting"), ('start: %json {"type": "null"}', "%json"), ("start: (", "closed")]
)
def test_what_cannot_be_matched_is_refused_with_its_reason(client: openai.OpenAI, definition: str, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        client.responses.create(**asked(definition), input="Edit")
    assert caught.value.param == "tools[0].format.definition"


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "(" start ")" | "x"',
        'start: N (";" N)~1..2\nN: /[0-9]/\n%ignore /[ ]/',
        'start: "<" %json {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],'
        ' "additionalProperties": false} ">"',
    ],
)
def test_an_answer_may_nest_ignore_and_hold_json(server: Server, grammar: str) -> None:
    """Nothing is quoted there, so that llguidance's whole dialect holds."""
    body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 200,
            "structured_outputs": {"grammar": grammar}}  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert accepts(Grammar(kind="lark", text=grammar), choice["message"]["content"])
