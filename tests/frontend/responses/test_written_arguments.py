"""Arguments as models write them, numbers of any length included, become items without an error."""

from __future__ import annotations

import json

import pytest

from frontend.responses.tools import custom_input, shell_fields

LONG = "1" * 5000


@pytest.mark.parametrize("number", ["1e999", LONG])
def test_a_number_of_any_length_leaves_the_arguments_as_they_are(number: str) -> None:
    assert custom_input(f'{{"other": {number}}}') == f'{{"other": {number}}}'
    assert custom_input(f'{{"input": "text", "other": {number}}}') == "text"


@pytest.mark.parametrize("number", ["1e999", LONG])
def test_a_shell_call_with_such_a_number_is_no_shell_call(number: str) -> None:
    assert shell_fields("shell", f'{{"commands": ["ls"], "timeout_ms": {number}}}') is None
    fields = shell_fields("shell", json.dumps({"commands": ["ls"], "timeout_ms": 5}))
    assert fields is not None and fields["action"]["timeout_ms"] == 5
