"""The setting that names LoRA adapters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters import parse, to_setting
from shared.errors import BadConfig

NAMES = st.text("abcXYZ019._-/", min_size=1, max_size=12).filter(lambda name: name[0].isalnum())
PLACES = st.text("abc/~._- ä", min_size=1, max_size=20).map(str.strip).filter(bool)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", {}),
        (" ", {}),
        ("sql=./sql-lora", {"sql": "./sql-lora"}),
        ("sql=/a/b, tone = org/tone", {"sql": "/a/b", "tone": "org/tone"}),
        ("/adapters/sql/", {"sql": "/adapters/sql/"}),
        ("org/tone", {"tone": "org/tone"}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_names_and_places(setting: str, expected: dict[str, str]) -> None:
    assert parse(setting) == expected


@pytest.mark.parametrize("setting", ["=x", "a=", "a=x,", ",", "a=x,a=y", "x/a,y/a", "a b=x", "-a=x", "/"])
def test_what_is_neither_is_refused(setting: str) -> None:
    with pytest.raises(BadConfig, match="adapters: "):
        parse(setting)


@given(st.dictionaries(NAMES, PLACES, max_size=4))
def test_what_was_parsed_makes_the_same_setting(adapters: dict[str, str]) -> None:
    assert parse(to_setting(adapters)) == adapters


@pytest.mark.parametrize("adapters", [{"a": "x,y"}, {"a": " x"}, {"a=b": "x"}, {"a": ""}, {"a,b": "x"}])
def test_names_that_cannot_be_written_are_refused(adapters: dict[str, str]) -> None:
    with pytest.raises(BadConfig, match="adapters: "):
        to_setting(adapters)
