"""What an output has to match, as a checked Grammar: from response formats, structured outputs, tools and tool choices.

`grammar_for` is the one way in: each API says what the answer must look like (`answer`) and which tools may or must be
called (`calls`), and gets one grammar, or None where nothing is constrained.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark
from msgspec import Struct

from frontend.output_parser import OutputFormat
from frontend.schemas import ResponseFormat, StructuredOutputs, Tool
from frontend.tokenizer import ModelText
from frontend.tools import harmony
from frontend.tools.calls import CallTool, NotExpressible, Rules, free_text_then_calls
from shared.errors import InvalidRequest
from shared.grammar import Compiler, json_schema
from shared.messages import Grammar, WorkerInfo


class Answer(Struct, frozen=True, kw_only=True):
    """What the answer proper has to match; `param` is the request's field that says so."""

    grammar: Grammar
    param: str


class Calls(Struct, frozen=True, kw_only=True):
    """Which calls the output may hold. `is_required`: at least one, and nothing else; otherwise text may come first.

    `only` names the one tool that may be called, `param` is where the request has a tool's schema. `is_limited`: the
    client allowed some of its tools only, so that no other may be called.
    """

    tools: Sequence[Tool]
    is_required: bool = False
    is_single: bool = False
    is_limited: bool = False
    only: str | None = None
    param: str = "tools[{}].function.parameters"

    @property
    def needs_grammar(self) -> bool:
        return self.is_required or self.is_limited or any(tool.function.strict for tool in self.tools)

    def call_tools(self) -> list[CallTool]:
        """The tools that may be called, as grammars want them."""
        return [
            CallTool(
                name=tool.function.name,
                parameters=tool.function.parameters or {"type": "object", "properties": {}},
                is_strict=bool(tool.function.strict),
                param=self.param.format(i),
            )
            for i, tool in enumerate(self.tools)
            if self.only in (None, tool.function.name)
        ]


class GrammarChecker:
    """Compiles grammars in the frontend, so that a bad one is a 400 and never reaches a worker. One at a time."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._compiler: Compiler | None = None
        self._lock = asyncio.Lock()

    async def compiler(self, target: WorkerInfo) -> Compiler:
        """Made on first use: large vocabularies take up to a second."""
        async with self._lock:
            if self._compiler is None:
                ids = {*self._text.eos_token_ids, *target.eos_token_ids}
                self._compiler = await asyncio.to_thread(Compiler, self._text.tokenizer, ids, target.vocab_size)
            return self._compiler

    async def check(self, grammar: Grammar, target: WorkerInfo, param: str) -> Grammar:
        """Raises InvalidRequest that names `param`: the grammar does not compile."""
        compiler = await self.compiler(target)
        async with self._lock:
            try:
                await asyncio.to_thread(compiler.matcher, grammar)
            except InvalidRequest as error:
                raise InvalidRequest(f"{param}: {error.message}", param=param) from error
        return grammar


def answer_of(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Answer | None:
    """The answer's grammar that these two fields ask for.

    Raises:
        InvalidRequest: both do, or one is incomplete.
    """
    if response_format is not None and response_format.type != "text":
        if structured is not None:
            raise InvalidRequest(
                "structured_outputs: response_format asks for a format too", param="structured_outputs"
            )
        return _of_response_format(response_format)
    return _of_structured_outputs(structured) if structured is not None else None


def json_answer(schema: dict[str, Any], param: str) -> Answer:
    """JSON that matches `schema`."""
    return Answer(grammar=Grammar(kind="json_schema", text=json.dumps(schema)), param=param)


def _of_response_format(response_format: ResponseFormat) -> Answer:
    if response_format.type == "json_object":
        return Answer(grammar=Grammar(kind="json_object"), param="response_format")
    if response_format.json_schema is None:
        raise InvalidRequest(
            "response_format.json_schema: required field is missing", param="response_format.json_schema"
        )
    schema = response_format.json_schema.schema
    return json_answer({} if schema is None else schema, "response_format.json_schema.schema")


def _of_structured_outputs(wanted: StructuredOutputs) -> Answer:
    """vLLM's extra field: exactly one of its members."""
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) not in (None, False)]
    if len(given) != 1:
        text = f"structured_outputs: exactly one of {', '.join(wanted.__struct_fields__)} is wanted, not {len(given)}"
        raise InvalidRequest(text, param="structured_outputs")
    param = f"structured_outputs.{given[0]}"
    if wanted.regex is not None:
        grammar = Grammar(kind="regex", text=wanted.regex)
    elif wanted.choice is not None:
        grammar = Grammar(kind="lark", text="start: " + " | ".join(json.dumps(text) for text in wanted.choice))
    elif wanted.grammar is not None:
        grammar = Grammar(kind="lark", text=_lark(wanted.grammar, param))
    elif wanted.json is not None:
        grammar = Grammar(
            kind="json_schema", text=wanted.json if isinstance(wanted.json, str) else json.dumps(wanted.json)
        )
    else:
        grammar = Grammar(kind="json_object")
    return Answer(grammar=grammar, param=param)


def _lark(text: str, param: str) -> str:
    """Lark source; EBNF in llama.cpp's notation (GBNF, "::=") is translated."""
    if "::=" not in text:
        return text
    try:
        return any_to_lark(text)
    except Exception as error:  # the translator raises what it likes
        raise InvalidRequest(f"{param}: the EBNF cannot be translated: {error}", param=param) from error


async def grammar_for(
    checker: GrammarChecker,
    target: WorkerInfo,
    output_format: OutputFormat,
    *,
    answer: Answer | None = None,
    calls: Calls | None = None,
) -> Grammar | None:
    """The grammar of a whole output without its reasoning; None: nothing is constrained.

    Args:
        calls: None or no tools: none may be made.

    Raises:
        InvalidRequest: a schema or grammar is bad or has keywords that are not supported, or the model's way of writing
            calls cannot express it; `param` names the field.
    """
    if calls is not None and not calls.tools:
        calls = None
    if calls is not None and calls.is_required:
        answer = None  # the output is calls and nothing else
    if answer is None and (calls is None or not calls.needs_grammar):
        return None
    param = ""
    if answer is not None:
        param = answer.param
        await checker.check(answer.grammar, target, answer.param)
    if calls is None and not output_format.is_harmony:
        assert answer is not None, "there is one or the other"
        return answer.grammar
    tools = calls.call_tools() if calls is not None else []
    for tool in tools:
        if tool.is_strict:
            schema = Grammar(kind="json_schema", text=json.dumps(tool.parameters))
            await checker.check(schema, target, tool.param)
    compiler = await checker.compiler(target)
    rules = Rules(compiler, output_format.tools.markers if output_format.tools is not None else harmony.MARKERS)
    body = _body(answer, rules) if answer is not None else None
    try:
        start = _start(output_format, rules, calls, tools, body)
    except NotExpressible as error:
        raise InvalidRequest(f"{error.param}: {error}", param=error.param) from error
    return await checker.check(Grammar(kind="lark", text=rules.source(start)), target, "tools" if calls else param)


def _start(
    output_format: OutputFormat, rules: Rules, calls: Calls | None, tools: Sequence[CallTool], body: str | None
) -> str:
    is_required, is_single = calls is not None and calls.is_required, calls is not None and calls.is_single
    if output_format.is_harmony:
        return harmony.grammar(rules, tools, body, is_required=is_required)
    form = output_format.tools
    assert form is not None, "requests with tools need a format"
    syntax = form.grammar(rules, tools, is_single)
    if is_required:
        return syntax.forced
    if body is not None:
        return f"{body} | {syntax.forced}"
    return free_text_then_calls(rules, syntax, form)


def _body(answer: Answer, rules: Rules) -> str:
    """The answer's grammar as a part of a larger one."""
    grammar = answer.grammar
    if grammar.kind == "json_object":
        return rules.add("%json " + json.dumps(json_schema({"type": "object"})))
    if grammar.kind == "json_schema":
        return rules.add("%json " + json.dumps(json_schema(json.loads(grammar.text))))
    text = f"{answer.param}: regular expressions and grammars cannot be combined with tools or with this model's format"
    raise InvalidRequest(text, param=answer.param)
