"""The text of a freeform tool's input, read out of the JSON arguments while they arrive."""

from __future__ import annotations

import json
import re

INPUT = "input"  # the one parameter of the function that stands for a freeform tool

_START = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
_ESCAPE_CHARS = 6  # \uXXXX


def sendable(text: str) -> str:
    """Half a surrogate pair, which JSON can write and UTF-8 cannot, as a question mark."""
    return text.encode("utf-8", "replace").decode()


class FreeformInput:
    """Feed it pieces of a JSON object; it gives pieces of the string that is its first member `input`.

    Objects of another form give nothing here: their text is known when they are complete.
    """

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False
        self._has_ended = False

    def feed(self, piece: str) -> str:
        if self._has_ended:
            return ""
        self._held += piece
        if not self._has_begun:
            start = _START.match(self._held)
            if start is None:
                return ""
            self._held = self._held[start.end() :]
            self._has_begun = True
        end = self._whole_chars()
        raw, self._held = self._held[:end], self._held[end:]
        text: str = json.loads(f'"{raw}"', strict=False)
        return sendable(text)

    def _whole_chars(self) -> int:
        """How much of what is held can be decoded: no half escape or surrogate pair, nothing after the end."""
        held, i = self._held, 0
        while i < len(held):
            if held[i] == '"':
                self._has_ended = True
                return i
            if held[i] != "\\":
                i += 1
                continue
            if held.startswith("\\u", i):
                step = _ESCAPE_CHARS
                is_half = held[i + 2 : i + 4].lower() in ("d8", "d9", "da", "db")
                if is_half and "\\u".startswith(held[i + step : i + step + 2]):  # the other half comes with it
                    step += _ESCAPE_CHARS
            else:
                step = 2
            if i + step > len(held):
                return i
            i += step
        return i
