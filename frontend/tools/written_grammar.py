"""Parameters one after another between tags, for formats whose strings stand there without quotes."""

from __future__ import annotations

from collections.abc import Callable

from frontend.tools.calls import NEWLINE, CallTool, Rules, without
from frontend.tools.schema import Parameter, parameters, resolve, standing_alone, strings_of, text_terminal
from frontend.tools.written_values import types_of


def written_parameters(
    rules: Rules,
    tool: CallTool,
    *,
    head: Callable[[str], str],
    end: str,
    tail: str = "",
    strips_newlines: bool,
    pads: bool,
) -> str:
    """All parameters of a tool as the format writes them; those that are not required may be left out.

    Args:
        head: a parameter's name to the text before its value.
        end: the marker after a value.
        tail: what follows the marker.
        strips_newlines: the parser takes a newline away at both ends of a value.
        pads: values are written between newlines.
    """
    parts: list[str] = []
    for parameter in parameters(tool):
        if any(sign in parameter.name for sign in "<>\n\"'") or parameter.name != parameter.name.strip():
            raise tool.refuse(f"a parameter's name {parameter.name!r} cannot be written in this model's format")
        value = _value(rules, tool, parameter, end, strips_newlines=strips_newlines, pads=pads)
        body = f"{rules.literal(head(parameter.name))} {value}" + (f" {rules.literal(tail)}" if tail else "")
        name = rules.add(body)
        parts.append(name if parameter.is_required else f"{name}?")
    return " ".join(parts)


def _value(rules: Rules, tool: CallTool, parameter: Parameter, end: str, *, strips_newlines: bool, pads: bool) -> str:
    """A value and the marker after it."""
    schema = parameter.schema
    if types_of(schema) != {"string"}:  # anything else is JSON, which the parser reads by the schema's type
        json = rules.json(standing_alone(tool, schema), is_strict=tool.is_strict)
        return (
            f"{rules.literal(NEWLINE)} {json} {rules.literal(NEWLINE + end)}"
            if pads
            else f"{json} {rules.literal(end)}"
        )
    strings = strings_of(tool, resolve(tool, schema))
    if strings is not None:
        return _one_of(rules, tool, strings, end, strips_newlines=strips_newlines, pads=pads)
    base = text_terminal(tool, schema)
    if base and strips_newlines:  # the newlines are the format's, so that those of the text stay
        newline = rules.literal("\n")
        if rules.is_token(end):
            text = rules.terminal(f'({base} & {without(end)}) "\\n"')
            return f"{newline} {text} {rules.literal(end)}"
        return f"{newline} {rules.terminal(_padded(base, end))}"
    text = rules.text_until(end, base)
    return f"{rules.literal(NEWLINE)} {text}" if pads else text


def _padded(base: str, end: str) -> str:
    written = "\\n" + end.replace("\\", "\\\\").replace('"', '\\"')
    return f'({base} & {without(end)}) "{written}"'


def _one_of(rules: Rules, tool: CallTool, strings: list[str], end: str, *, strips_newlines: bool, pads: bool) -> str:
    written: list[str] = []
    for text in strings:
        if end in text:
            raise tool.refuse(f"the string {text!r} holds the marker that ends a value")
        has_edges = strips_newlines and (text.startswith("\n") or text.endswith("\n"))
        written.append(rules.literal(f"\n{text}\n" if pads or has_edges else text))
    choice = " | ".join(part for part in written if part)
    optional = "?" if "" in written else ""
    return f"({choice}){optional} {rules.literal(end)}" if choice else rules.literal(end)
