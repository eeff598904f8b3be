"""Reading JSON that a model wrote, in which numbers may be of any length."""

from __future__ import annotations

import json
from typing import Any


def decode(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Numbers beyond a float's range become infinite; control characters in strings are taken as they are.

    Raises:
        ValueError: not JSON.
    """
    return json.loads(text, strict=False, parse_int=_whole_number)


def _whole_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python reads
        return float(digits)
