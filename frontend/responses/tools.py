"""A request's tools as the functions that chat templates know, and calls of those functions back as items.

Templates know functions only, so every other kind of tool is told to the model as one: a freeform tool as a function
with the single parameter `input`, shells and patches as functions with the parameters of their calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from frontend.responses import items
from frontend.responses.freeform import INPUT, sendable
from frontend.responses.lark_regex import regex_of
from frontend.responses.schemas import (
    AnyTool,
    ApplyPatchTool,
    CustomTool,
    FunctionTool,
    GrammarFormat,
    LocalShellTool,
    NamespaceTool,
    ShellTool,
    ToolChoice,
)
from frontend.schemas import Function, Tool
from shared import model_json
from shared.errors import InvalidRequest

Kind = Literal["function", "custom", "local_shell", "shell", "apply_patch"]

_TEXTS = {"type": "array", "items": {"type": "string"}}
_LOCAL_SHELL = Function(
    name="local_shell",
    description="Runs a command on the user's machine and returns its output.",
    parameters={
        "type": "object",
        "properties": {
            "command": _TEXTS | {"description": 'Program and arguments, for example ["bash", "-lc", "ls"]'},
            "working_directory": {"type": "string"},
            "timeout_ms": {"type": "integer"},
        },
        "required": ["command"],
    },
)  # fmt: skip
_SHELL = Function(
    name="shell",
    description="Runs shell commands on the user's machine and returns their output.",
    parameters={
        "type": "object",
        "properties": {
            "commands": _TEXTS | {"description": "Shell commands, run one after another"},
            "timeout_ms": {"type": "integer"},
            "max_output_length": {"type": "integer", "description": "Characters of output to return"},
        },
        "required": ["commands"],
    },
)
_APPLY_PATCH = Function(
    name="apply_patch",
    description="Creates, changes or deletes one file.",
    parameters={
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
            "path": {"type": "string"},
            "diff": {"type": "string", "description": "V4A diff of the file's lines; not for delete_file"},
        },
        "required": ["type", "path"],
    },
)


class Known(Struct, frozen=True):
    """A tool that the model may call, under the name that it is told."""

    kind: Kind
    function: Function
    name: str  # as the client calls it
    namespace: str | None = None


class ToolTable:
    """The tools of one request, by the names that the model is told."""

    def __init__(self, known: Sequence[Known]) -> None:
        self._known = {tool.function.name: tool for tool in known}

    @property
    def functions(self) -> list[Tool] | None:
        return [Tool(type="function", function=tool.function) for tool in self._known.values()] or None

    def find(self, kind: str, name: str | None) -> str | None:
        """The name that the model is told of the tool of this kind, and of this name where it has one."""
        for told, tool in self._known.items():
            if tool.kind == kind and (name is None or name == tool.name):
                return told
        return None

    def get(self, told_name: str) -> Known:
        """A name that is nobody's (the model made it up) is a function's, as the client will find out."""
        return self._known.get(told_name) or Known("function", Function(name=told_name), told_name)


def told_name(name: str, namespace: str | None) -> str:
    return name if namespace is None else f"{namespace.rstrip('_')}__{name}"


def table(tools: Sequence[AnyTool], choice: str | ToolChoice) -> ToolTable:
    """The tools that may be called.

    Raises:
        InvalidRequest: two tools of one name, or `tool_choice` allows one that is not there.
    """
    known: dict[str, Known] = {}
    for place, tool in _flat(tools):
        if tool.function.name in known:
            raise InvalidRequest(f"{place}: there is a tool {tool.function.name!r} before it", param=place)
        known[tool.function.name] = tool
    if choice == "none":
        return ToolTable([])
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        return ToolTable(_allowed(list(known.values()), choice))
    return ToolTable(list(known.values()))


def _allowed(known: Sequence[Known], choice: ToolChoice) -> list[Known]:
    wanted = choice.tools or []
    for i, entry in enumerate(wanted):
        if not any(_is_meant(tool, entry) for tool in known):
            place = f"tool_choice.tools[{i}]"
            raise InvalidRequest(f"{place}: tools has no such tool", param=place)
    return [tool for tool in known if any(_is_meant(tool, entry) for entry in wanted)]


def _is_meant(tool: Known, entry: Mapping[str, Any]) -> bool:
    return entry.get("type") == tool.kind and entry.get("name", tool.name) == tool.name


def _flat(tools: Sequence[AnyTool]) -> Iterator[tuple[str, Known]]:
    for i, tool in enumerate(tools):
        place = f"tools[{i}]"
        match tool:
            case FunctionTool():
                yield place, _function(tool, None)
            case CustomTool():
                yield place, _custom(tool, None, place)
            case LocalShellTool():
                yield place, Known("local_shell", _LOCAL_SHELL, _LOCAL_SHELL.name)
            case ShellTool():
                yield place, Known("shell", _SHELL, _SHELL.name)
            case ApplyPatchTool():
                yield place, Known("apply_patch", _APPLY_PATCH, _APPLY_PATCH.name)
            case NamespaceTool():
                for j, inner in enumerate(tool.tools):
                    where = f"{place}.tools[{j}]"
                    made = _function(inner, tool) if isinstance(inner, FunctionTool) else _custom(inner, tool, where)
                    yield where, made


def _function(tool: FunctionTool, group: NamespaceTool | None) -> Known:
    namespace = group.name if group is not None else None
    described = Function(
        name=told_name(tool.name, namespace),
        description=_described(tool, group),
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Known("function", described, tool.name, namespace)


def _custom(tool: CustomTool, group: NamespaceTool | None, place: str) -> Known:
    namespace = group.name if group is not None else None
    text = {"type": "string", "description": "The tool's input as free text"}
    if isinstance(tool.format, GrammarFormat):
        syntax = "Lark grammar" if tool.format.syntax == "lark" else "regular expression"
        text["description"] = f"Free text that matches this {syntax}:\n{tool.format.definition}"
        where = f"{place}.format.definition"
        regex = tool.format.definition if tool.format.syntax == "regex" else regex_of(tool.format.definition, where)
        text["pattern"] = f"^(?:{regex})$"
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
    described = Function(
        name=told_name(tool.name, namespace),
        description=_described(tool, group),
        parameters=parameters,
        strict=isinstance(tool.format, GrammarFormat) or None,
    )
    return Known("custom", described, tool.name, namespace)


def _described(tool: FunctionTool | CustomTool, group: NamespaceTool | None) -> str | None:
    texts = [group.description if group is not None else None, tool.description]
    return "\n".join(text for text in texts if text) or None


# ---------------------------------------------------------------- from calls to items


def custom_input(arguments: str) -> str:
    """The text that a freeform tool gets; arguments of another shape are passed on as they were written."""
    content = model_json.decode(arguments)
    text = content.get(INPUT) if isinstance(content, dict) else None
    return sendable(text) if isinstance(text, str) else arguments


def shell_fields(kind: Kind, arguments: str) -> dict[str, Any] | None:
    """The fields of a shell's or a patch's item; None where the arguments do not fit, so that it is no such call."""
    content = model_json.decode(sendable(arguments))
    if not isinstance(content, dict):
        return None
    try:
        match kind:
            case "local_shell":
                command = content.pop("command", None)
                content["command"] = ["bash", "-lc", command] if isinstance(command, str) else command
                action = msgspec.to_builtins(msgspec.convert(content, items.LocalShellAction))
                return {"action": {"type": "exec", "env": {}, **action}}
            case "shell":
                commands = content.pop("commands", None)
                content["commands"] = [commands] if isinstance(commands, str) else commands
                bare = {"timeout_ms": None, "max_output_length": None}
                return {"action": bare | msgspec.to_builtins(msgspec.convert(content, items.ShellAction))}
            case "apply_patch":
                operation = msgspec.convert(content, items.PatchOperation)
                if operation.type != "delete_file" and operation.diff is None:
                    return None
                return {"operation": msgspec.to_builtins(operation)}
            case _:
                raise AssertionError(f"{kind} has its arguments as they are")
    except msgspec.ValidationError:
        return None


# ---------------------------------------------------------------- from items to calls


def call_of(item: items.Call) -> tuple[str, str]:
    """The name that the model is told, and the arguments as JSON."""
    match item:
        case items.FunctionCall():
            return told_name(item.name, item.namespace), item.arguments
        case items.CustomToolCall():
            return told_name(item.name, item.namespace), _json({INPUT: item.input})
        case items.LocalShellCall():
            content = msgspec.to_builtins(item.action)
            return _LOCAL_SHELL.name, _json({key: content[key] for key in content if key not in ("type", "env")})
        case items.ShellCall():
            return _SHELL.name, _json(msgspec.to_builtins(item.action))
        case items.ApplyPatchCall():
            return _APPLY_PATCH.name, _json(msgspec.to_builtins(item.operation))


def shell_result(results: Sequence[items.ShellResult]) -> str:
    """What commands printed, as text for the model."""
    texts = []
    for result in results:
        parts = [result.stdout, result.stderr and f"stderr:\n{result.stderr}"]
        timed_out = result.outcome.type == "timeout"
        parts.append("(timed out)" if timed_out else f"(exit code {result.outcome.exit_code or 0})")
        texts.append("\n".join(part for part in parts if part))
    return "\n".join(texts)


def _json(content: object) -> str:
    return msgspec.json.encode(content).decode()
