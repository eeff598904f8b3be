"""What a tool call format is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from msgspec import Struct

from frontend.tools.calls import CallSyntax, CallTool, Rules
from frontend.tools.cursor import Cursor, Steps
from frontend.tools.sink import Sink


class ToolFormat(Struct, frozen=True, kw_only=True):
    """How one family of models writes tool calls.

    `starts` are the markers that begin a call; `read` gets the cursor after one and reads the call, or several. The
    markers in `frames` stand around calls and mean nothing themselves: they are not shown. `begins_bare` also tries at
    a brace that begins the output, for models that may leave the marker out.
    """

    name: str
    starts: tuple[str, ...]
    read: Callable[[Cursor, Sink, str], Steps[None]]  # (cursor, sink, start marker)
    grammar: Callable[[Rules, Sequence[CallTool], bool], CallSyntax]  # (rules, tools, one call only)
    frames: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()  # further markers that may be special tokens
    begins_bare: bool = False
    history_id: Callable[[str, str, int], str] | None = None  # (id, tool name, calls before) -> what the template wants

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must be shown to the parser even if they are special tokens."""
        return (*self.starts, *self.frames, *self.inner)


def short_id(call_id: str, _name: str, _num_before: int) -> str:
    """Nine letters and digits, which Mistral's templates insist on."""
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def counted_id(_call_id: str, name: str, num_before: int) -> str:
    """Kimi's naming, which the model continues: functions.name:3."""
    return f"functions.{name}:{num_before}"
