"""What a request's output has to match: its text format, forced and strict tool calls, its reasoning."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.grammar import Answer, Calls, json_answer
from frontend.responses.schemas import (
    ContextBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    ReasoningConfig,
    TextConfig,
    ToolChoice,
)
from frontend.responses.tools import ToolTable
from frontend.schemas import Tool
from frontend.service import Service
from frontend.thinking import ThinkingPlan, ThinkingRequest, markers, plan
from shared.errors import InvalidRequest
from shared.messages import Grammar

_SCHEMA_PARAM = "tools[{}].parameters"


def answer_of(text: TextConfig | None) -> Answer | None:
    """The grammar of the answer proper."""
    match text.format if text is not None else None:
        case JsonObjectFormat():
            return Answer(grammar=Grammar(kind="json_object"), param="text.format")
        case JsonSchemaFormat(schema_=schema):
            return json_answer(schema, "text.format.schema")
        case _:
            return None


def calls_of(body: ContextBody, table: ToolTable, tools: Sequence[Tool] | None) -> Calls | None:
    """Which calls the output may or must hold; `tools` are those that the model is told of.

    Raises:
        InvalidRequest: tool_choice forces a call of a tool that is not there.
    """
    choice = body.tool_choice
    is_named = isinstance(choice, ToolChoice) and choice.type != "allowed_tools"
    is_required = choice == "required" or (isinstance(choice, ToolChoice) and choice.mode == "required")
    if not tools:
        if is_named or is_required:
            raise InvalidRequest("tool_choice: needs tools", param="tool_choice")
        return None
    if isinstance(choice, ToolChoice) and is_named:
        name = table.find(choice.type, choice.name)
        if name is None:
            raise InvalidRequest("tool_choice: it is none of the request's tools", param="tool_choice")
        return Calls(tools=tools, is_required=True, is_single=True, only=name, param=_SCHEMA_PARAM)
    return Calls(
        tools=tools,
        is_required=is_required,
        is_single=not body.parallel_tool_calls,
        is_limited=isinstance(choice, ToolChoice),
        param=_SCHEMA_PARAM,
    )


def thinking_of(service: Service, reasoning: ReasoningConfig | None) -> ThinkingPlan:
    """Clients (Codex) send an effort to any model, so it only acts on one that reasons."""
    effort = reasoning.effort if reasoning is not None else None
    knows_effort = service.template is not None and service.template.knows_effort
    if effort is None or not (knows_effort or markers(service.output_format) is not None):
        return plan(service, ThinkingRequest())
    if effort == "none":
        return plan(service, ThinkingRequest(is_enabled=False))
    return plan(service, ThinkingRequest(is_enabled=True, effort=effort))
