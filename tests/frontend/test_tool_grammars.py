"""Forced and strict calls in every format: what a random model writes is read by the format's own parser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer

from frontend import tools
from frontend.grammar import Calls, GrammarChecker, grammar_for, json_answer
from frontend.output_events import Call, Text, settle
from frontend.output_parser import OutputFormat, OutputParser, Request
from frontend.schemas import Function, Tool
from frontend.tools import harmony
from shared.errors import InvalidRequest
from shared.grammar import Compiler
from shared.messages import Grammar, SamplingParams
from tests.frontend.conftest import byte_text
from tests.frontend.tool_outputs import SCHEMAS, output_format
from tests.support.fake_engine import worker_info
from tests.support.grammar_rig import EOS, GrammarRig, compiler, ids, tokenizer, vocab_size

pytestmark = pytest.mark.mlx

READ: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 5},
        "mode": {"type": "string", "enum": ["r", "rw", "\nx"]},
        "limit": {"type": "integer", "minimum": 0, "maximum": 99},
        "whole": {"type": "boolean", "description": "all of it"},
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "lines": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "options": {
            "type": "object",
            "properties": {"x": {"type": "string", "maxLength": 5}, "y": {"type": ["integer", "null"]}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,2}$"},
        "kind": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/kind"}]},
    },
    "required": ["mode", "limit", "whole", "lines", "options"],
    "additionalProperties": False,
    "$defs": {"kind": {"enum": ["a", "b", 3]}},
}
STOP: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
PARAMETERS = {"read": READ, "stop": STOP}
_TAGGED = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
_DEEPSEEK = "<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_KIMI = "<|tool_call_begin|>functions.stop:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
TWO_CALLS = {
    "hermes": f"{_TAGGED}\n{_TAGGED}",
    "qwen3_coder": "\n".join(["<tool_call>\n<function=stop>\n</function>\n</tool_call>"] * 2),
    "llama3": '{"name": "stop", "parameters": {}}; {"name": "stop", "parameters": {}}',
    "mistral": '[TOOL_CALLS][{"name": "stop", "arguments": {}}, {"name": "stop", "arguments": {}}]',
    "gemma4": "<|tool_call>call:stop{}<tool_call|><|tool_call>call:stop{}<tool_call|>",
    "glm4": "<tool_call>stop\n</tool_call>\n<tool_call>stop\n</tool_call>",
    "longcat": "<longcat_tool_call>stop\n</longcat_tool_call>\n<longcat_tool_call>stop\n</longcat_tool_call>",
    "deepseek": f"<｜tool▁calls▁begin｜>{_DEEPSEEK}{_DEEPSEEK}<｜tool▁calls▁end｜>",
    "kimi_k2": f"<|tool_calls_section_begin|>{_KIMI}{_KIMI}<|tool_calls_section_end|>",
    "minimax": "<minimax:tool_call>\n" + '<invoke name="stop">\n</invoke>\n' * 2 + "</minimax:tool_call>",
    "lfm2": "<|tool_call_start|>[stop(), stop()]<|tool_call_end|>",
}


def make_tools(*, strict: bool | None = True, **parameters: dict[str, Any]) -> list[Tool]:
    return [
        Tool(type="function", function=Function(name=name, parameters=schema, strict=strict))
        for name, schema in (parameters or PARAMETERS).items()
    ]


def grammar(
    form: OutputFormat, calls: Calls, answer: dict[str, Any] | None = None, using: Tokenizer | None = None
) -> Grammar | None:
    checker = GrammarChecker(byte_text(tokenizer=using or tokenizer(), eos_token_ids=[EOS]))
    wanted = json_answer(answer, "response_format") if answer is not None else None
    return asyncio.run(grammar_for(checker, worker_info(vocab_size=vocab_size()), form, answer=wanted, calls=calls))


def blocks(name: str, text: str) -> list[Any]:
    parser = OutputParser(Request(output_format=output_format(name), prompt="", tools=PARAMETERS))
    return settle(parser.feed(text) + parser.close())


def outputs(chosen: Mapping[str, Grammar | None], count: int, max_tokens: int = 600) -> dict[str, list[str]]:
    """What a random model that spares spaces says under each grammar, without outputs that were cut off by the limit.

    All of them in one batch, since a step of one row takes as long as a step of many.
    """
    rig = GrammarRig()
    spaces = dict.fromkeys((*ids(" \n\r\t"), tokenizer().token_to_id("  ")), -4.0)
    for name, one in chosen.items():
        for i in range(count):
            sampling = SamplingParams(temperature=1.5, seed=i, is_seeded=True, logit_bias=spaces)
            rig.ask(f"{name} {i}", one, max_tokens, sampling)
    rig.drain()
    asked = {name: [f"{name} {i}" for i in range(count)] for name in chosen}
    assert all(rig.reason(r) != "error" for requests in asked.values() for r in requests), rig.outputs
    return {name: [rig.text(r) for r in requests if rig.reason(r) == "stop"] for name, requests in asked.items()}


@pytest.fixture(scope="module")
def forced_reads() -> dict[str, list[str]]:
    calls = Calls(tools=make_tools(read=READ), is_required=True, is_single=True)
    return outputs({name: grammar(output_format(name), calls) for name in tools.NAMES}, 3)


@pytest.fixture(scope="module")
def forced_stops() -> dict[str, list[str]]:
    """Of a tool without parameters, named out of two."""
    calls = Calls(tools=make_tools(), is_required=True, is_single=True, only="stop")
    return outputs({name: grammar(output_format(name), calls) for name in tools.NAMES}, 1)


@pytest.fixture(scope="module")
def only_stops() -> dict[str, list[str]]:
    """Of the only tool that there is."""
    calls = Calls(tools=make_tools(stop=STOP), is_required=True, is_single=True)
    return outputs({name: grammar(output_format(name), calls) for name in tools.NAMES}, 1)


@pytest.mark.parametrize("name", tools.NAMES)
def test_forced_calls_are_read_by_their_own_parser(name: str, forced_reads: dict[str, list[str]]) -> None:
    calls = Calls(tools=make_tools(read=READ), is_required=True, is_single=True)
    texts = forced_reads[name]
    assert texts
    with_tokens = marked_tokenizer(name)
    special = grammar(output_format(name), calls, using=with_tokens)
    for text in texts:
        (call,) = blocks(name, text)
        assert isinstance(call, Call) and call.name == "read", text
        jsonschema.validate(json.loads(call.arguments), READ)
        if name != "mistral":  # whose way of writing depends on the vocabulary
            assert accepts(special, text, using=with_tokens), "the same where markers are special tokens"


@pytest.mark.parametrize("name", tools.NAMES)
def test_a_named_tool_is_the_only_one(name: str, forced_stops: dict[str, list[str]]) -> None:
    assert forced_stops[name]
    for text in forced_stops[name]:
        assert [(b.name, json.loads(b.arguments)) for b in blocks(name, text)] == [("stop", {})]


@pytest.mark.parametrize("name", sorted(TWO_CALLS))
def test_calls_in_parallel(name: str) -> None:
    several = grammar(output_format(name), Calls(tools=make_tools(stop=STOP), is_required=True))
    single = grammar(output_format(name), Calls(tools=make_tools(stop=STOP), is_required=True, is_single=True))
    text = TWO_CALLS[name]
    assert [block.name for block in blocks(name, text)] == ["stop", "stop"]
    assert accepts(several, text) and not accepts(single, text)


def accepts(chosen: Grammar | None, text: str, using: Tokenizer | None = None) -> bool:
    assert chosen is not None
    known = using or tokenizer()
    matcher = (Compiler(known, [EOS], vocab_size()) if using else compiler()).matcher(chosen)
    return bool(matcher.consume_tokens(known.encode(text).ids)) and bool(matcher.is_accepting())


def marked_tokenizer(name: str) -> Tokenizer:
    """A vocabulary in which the format's markers are special tokens."""
    form = tools.get(name)
    marks = form.markers if form is not None else harmony.MARKERS
    made = Tokenizer.from_str(tokenizer().to_str())
    made.add_special_tokens([AddedToken(text, special=True) for text in marks if text.startswith(("<", "["))])
    return made


@pytest.mark.parametrize("name", tools.NAMES)
def test_strict_tools_leave_text_free_and_calls_bound(name: str, only_stops: dict[str, list[str]]) -> None:
    schema = SCHEMAS["read"] | {"required": ["path", "limit", "whole", "lines"], "additionalProperties": False}
    chosen = grammar(output_format(name), Calls(tools=make_tools(read=schema, stop=STOP)))
    call = only_stops[name][0]
    harmony = name == "harmony"
    answer = "<|channel|>final<|message|>Just an answer {1} <x>." if harmony else "Just an answer {1} <x>."
    assert accepts(chosen, answer + ("<|return|>" if harmony else ""))
    assert accepts(chosen, call)
    if not harmony:
        tagged = f"<|python_tag|>{call}" if name == "llama3" else call
        assert accepts(chosen, "First I look. " + tagged)
        assert [type(b) for b in blocks(name, "First I look. " + tagged)] == [Text, Call]
    assert not accepts(chosen, call.replace("stop", "fly"))


def test_an_answer_in_json_or_a_call() -> None:
    answer = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    chosen = grammar(output_format("hermes"), Calls(tools=make_tools(stop=STOP)), answer)
    assert accepts(chosen, '{"ok": true}')
    assert accepts(chosen, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert not accepts(chosen, "text")


def test_tools_that_are_not_strict_are_only_promised_a_call() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "made-up"}}, "required": ["a"]}
    chosen = grammar(output_format("hermes"), Calls(tools=make_tools(strict=None, f=odd), is_required=True))
    assert accepts(chosen, '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>')
    assert grammar(output_format("hermes"), Calls(tools=make_tools(strict=None, f=odd))) is None
    with pytest.raises(InvalidRequest, match="made-up") as caught:
        grammar(output_format("hermes"), Calls(tools=make_tools(f=odd), is_required=True))
    assert caught.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("name", "schema", "words"),
    [
        ("qwen3_coder", {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}, "'format'"),
        (
            "qwen3_coder",
            {"type": "object", "properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}]},
            "anyOf",
        ),
        ("qwen3_coder", {"type": "object", "properties": {"a>b": {"type": "string"}}}, "name"),
        ("minimax", {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "pattern"),
        ("glm4", {"type": "object", "properties": {"a": {"enum": ["x</arg_value>"]}}}, "marker"),
        ("lfm2", {"type": "object", "properties": {"a b": {"type": "string"}}}, "name"),
        ("gemma4", {"type": "object", "properties": {"a": {"enum": [[1]]}}}, "enum"),
        ("gemma4", {"type": "object", "properties": {"a b": {"type": "string"}}}, "key"),
    ],
)
def test_what_a_syntax_cannot_say_is_refused(name: str, schema: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        grammar(output_format(name), Calls(tools=make_tools(f=schema), is_required=True))
    assert caught.value.param == "tools[0].function.parameters"
