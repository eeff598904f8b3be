"""Stop strings: how the text is cut into pieces must not matter."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.stop import StopMatcher

TEXT = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


def plain_search(text: str, stops: list[str]) -> tuple[str, bool]:
    """Text before the stop string that is complete first; of two complete together, the longer."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(len(stop) for stop in found)], True
    return text, False


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return shown, True
    return shown + matcher.flush(), False


@given(text=TEXT, stops=STOPS, cuts=st.sets(st.integers(0, 12)))
def test_any_split_gives_what_a_plain_search_gives(text: str, stops: list[str], cuts: set[int]) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert streamed(pieces, stops) == plain_search(text, stops)


@given(text=TEXT, stops=STOPS)
def test_single_characters_give_what_a_plain_search_gives(text: str, stops: list[str]) -> None:
    assert streamed(list(text), stops) == plain_search(text, stops)


@given(text=TEXT, stops=STOPS)
def test_only_a_possible_beginning_of_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.feed(text)
    if matcher.matched is None:
        held = text[len(shown) :]
        longest = max(
            (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        assert len(held) == longest


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stops_all_text_passes(stops: list[str]) -> None:
    assert StopMatcher(stops).feed("abc") == "abc"
