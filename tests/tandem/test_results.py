"""What a user reads out of an output."""

from __future__ import annotations

import math

from tandem.results import ToolCall


def _parsed(arguments: str) -> dict[str, object]:
    return ToolCall(call_id="call_1", name="bell", arguments=arguments).parsed()


def test_arguments_become_a_dict() -> None:
    assert _parsed('{"times": 2, "loud": null}') == {"times": 2, "loud": None}


def test_numbers_beyond_a_float_do_not_lose_the_call() -> None:
    many_digits = "1" * 5000
    assert _parsed(f'{{"times": 2, "a": 1e999, "b": [-1e999, {many_digits}]}}') == {
        "times": 2,
        "a": math.inf,
        "b": [-math.inf, math.inf],
    }
