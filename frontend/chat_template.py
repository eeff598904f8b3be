"""Chat templates: Jinja from the model's files, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from frontend.tools.json_value import write_json
from frontend.tools.wide_numbers import has_wide_number
from shared.errors import BadModel, InvalidRequest


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:  # noqa: ANN401
    """Jinja's own tojson escapes HTML characters, which a model should not see."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
    except TypeError:
        if not has_wide_number(value):
            raise
        return write_json(value)  # on one line, whatever the options say: json has no hook for such numbers


_PROBE = "What does a template write of this?"


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that go through the parts of a content and would write nothing of a text."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


class ChatTemplate:
    """Renders messages to the prompt's text.

    Raises:
        BadModel: the template does not parse.
    """

    def __init__(self, source: str, special_texts: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._render: Callable[..., str] = environment.from_string(source).render
        except TemplateSyntaxError as error:
            raise BadModel(f"the chat template does not parse: {error}") from error
        self._special_texts = special_texts
        self._wants_parts = False
        self.knows_effort = "reasoning_effort" in source
        self.knows_tools = "tools" in source
        self.knows_developer = "developer" in source
        self._wants_parts = not self._shows(_PROBE) and self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: object) -> bool:
        """Whether the prompt of one message with this content holds `_PROBE`."""
        try:
            return _PROBE in self.render([{"role": "user", "content": content}])
        except InvalidRequest:
            return False

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        reserved = {"messages", "tools", "add_generation_prompt"} & set(kwargs or {})
        if reserved:
            raise InvalidRequest(
                f"chat_template_kwargs: {', '.join(sorted(reserved))} may not be set there",
                param="chat_template_kwargs",
            )
        values = {**self._special_texts, **(kwargs or {})}
        if self._wants_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            return self._render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **values
            )
        # A template is a program of the model's author: for messages it does not expect it raises what it likes.
        except Exception as error:
            raise InvalidRequest(f"the model's chat template refuses them: {error}", param="messages") from error
