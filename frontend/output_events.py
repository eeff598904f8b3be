"""What an output is made of once it is parsed: text, reasoning and tool calls, in the order in which they came."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct


class Text(Struct, frozen=True):
    """A piece of the answer proper."""

    text: str


class Reasoning(Struct, frozen=True):
    """A piece of what the model thinks before it answers."""

    text: str


class CallStart(Struct, frozen=True):
    """A tool call begins. `index` counts the calls of one output, failed ones included."""

    index: int
    call_id: str
    name: str


class CallArguments(Struct, frozen=True):
    """A piece of a call's arguments. The pieces so far are always the beginning of a valid JSON object."""

    index: int
    json: str


class CallEnd(Struct, frozen=True):
    """The call is complete and its arguments are a valid JSON object."""

    index: int


class CallFailed(Struct, frozen=True):
    """A call that had begun is malformed or was cut off: `raw` is its whole text, part of the answer instead."""

    index: int
    raw: str


Event = Text | Reasoning | CallStart | CallArguments | CallEnd | CallFailed


class Call(Struct, frozen=True):
    """A complete call; `arguments` is the text of a JSON object."""

    call_id: str
    name: str
    arguments: str


def settle(events: Iterable[Event]) -> list[Text | Reasoning | Call]:
    """A whole output: pieces joined, failed calls as the text they were."""
    parts: list[tuple[str, list[str], CallStart | None]] = []  # kind, pieces, and of a call its beginning
    place: dict[int, int] = {}
    for event in events:
        match event:
            case Text(text) | Reasoning(text):
                kind = "text" if isinstance(event, Text) else "reasoning"
                if not (parts and parts[-1][0] == kind):
                    parts.append((kind, [], None))
                parts[-1][1].append(text)
            case CallStart():
                place[event.index] = len(parts)
                parts.append(("call", [], event))
            case CallArguments():
                parts[place[event.index]][1].append(event.json)
            case CallFailed():
                parts[place[event.index]] = ("text", [event.raw], None)
    blocks: list[Text | Reasoning | Call] = []
    for kind, pieces, start in parts:
        joined = "".join(pieces)
        if start is not None:
            blocks.append(Call(start.call_id, start.name, joined))
        elif kind == "reasoning":
            blocks.append(Reasoning(joined))
        elif blocks and isinstance(blocks[-1], Text):
            blocks[-1] = Text(blocks[-1].text + joined)
        else:
            blocks.append(Text(joined))
    return blocks


def joined_text(events: Iterable[Event]) -> str:
    return "".join(block.text for block in settle(events) if isinstance(block, Text))
