"""Reading text that is still arriving.

Parsers are generators written as if the whole text were there: each read waits (yields) until it has enough. That makes
them independent of how the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")
Steps = Generator[None, None, _T]  # yields when it needs more text

_SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is not what the format demands; caught by the output parser, which then shows it as text.

    `is_call` is False where it was never more than a guess that a call begins here, so that nothing is counted.
    """

    def __init__(self, reason: str, *, is_call: bool = True) -> None:
        super().__init__(reason)
        self.is_call = is_call


class Cursor:
    """A position in text that grows at its end. What is after `mark` is kept: a failed call needs it."""

    def __init__(self) -> None:
        self.text = ""
        self.pos = 0
        self.mark = 0
        self.is_closed = False

    def push(self, piece: str) -> None:
        if self.mark == self.pos:  # else somebody is reading a call and may hold positions
            self.text = self.text[self.pos :]
            self.pos = self.mark = 0
        self.text += piece

    def more(self) -> Steps[None]:
        """Wait for more text. Raises Malformed when there will be none."""
        if self.is_closed:
            raise Malformed("the text ends too early")
        yield

    def peek(self, num_chars: int = 1) -> Steps[str]:
        """The next characters; fewer only at the end of the text."""
        while len(self.text) - self.pos < num_chars and not self.is_closed:
            yield
        return self.text[self.pos : self.pos + num_chars]

    def at_end(self) -> Steps[bool]:
        return not (yield from self.peek())

    def skip_space(self) -> Steps[None]:
        while True:
            while self.pos < len(self.text) and self.text[self.pos] in _SPACE:
                self.pos += 1
            if self.pos < len(self.text) or self.is_closed:
                return
            yield

    def sees(self, literal: str) -> Steps[bool]:
        """Whether `literal` comes next, which is then consumed."""
        if (yield from self.peek(len(literal))) != literal:
            return False
        self.pos += len(literal)
        return True

    def expect(self, literal: str) -> Steps[None]:
        """Consume `literal`. Raises Malformed where something else comes."""
        if not (yield from self.sees(literal)):
            raise Malformed(f"expected {literal!r}")

    def take_until(self, end: str) -> Steps[str]:
        """The text before `end`; both are consumed. Raises Malformed where it never comes."""
        num_searched = 0
        while True:
            place = self.text.find(end, self.pos + num_searched)
            if place >= 0:
                taken = self.text[self.pos : place]
                self.pos = place + len(end)
                return taken
            num_searched = max(0, len(self.text) - self.pos - len(end) + 1)
            yield from self.more()
