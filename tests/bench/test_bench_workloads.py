"""Workloads: the same seed gives the same requests; lengths are what was asked for."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.words import WORDS
from bench.workloads import TASK, EstimatedCounter, ServerCounter, Shape, build, choose_counter, parse_range

COUNT = EstimatedCounter()


class LongWordsCounter:
    """Two tokens for words of six letters or more: a tokenizer that the word list does not fit."""

    source = "test"

    def __call__(self, text: str) -> int:
        return sum(1 + (len(word) >= 6) for word in text.split())


@given(seed=st.integers(0, 2**32), prefix=st.sampled_from([0, 40]), mixed=st.sampled_from([None, (3, 30)]))
def test_same_seed_same_requests_and_other_seed_other_texts(
    seed: int, prefix: int, mixed: tuple[int, int] | None
) -> None:
    shape = Shape(num_requests=4, prompt_tokens=12, shared_prefix=prefix, mixed=mixed, request_rate=2.0)
    assert build(shape, seed, COUNT) == build(shape, seed, COUNT)
    assert build(shape, seed, COUNT)[0].text != build(shape, seed + 1, COUNT)[0].text


def test_texts_of_a_seed_are_those_of_every_other_machine() -> None:
    text = build(Shape(num_requests=1, prompt_tokens=6), 7, COUNT)[0].text
    assert text == "foot clear present black milk great"


@given(num_tokens=st.integers(1, 300), seed=st.integers(0, 99))
def test_prompts_have_the_asked_length(num_tokens: int, seed: int) -> None:
    (prompt,) = build(Shape(num_requests=1, prompt_tokens=num_tokens), seed, COUNT)
    assert prompt.num_tokens == COUNT(prompt.text) == num_tokens


@given(num_tokens=st.integers(20, 300), seed=st.integers(0, 99))
def test_length_is_met_within_one_token_by_a_tokenizer_that_splits_words(num_tokens: int, seed: int) -> None:
    count = LongWordsCounter()
    (prompt,) = build(Shape(num_requests=1, prompt_tokens=num_tokens), seed, count)
    assert abs(prompt.num_tokens - num_tokens) <= 1


def test_shared_prefix_starts_every_prompt_and_comes_on_top() -> None:
    made = build(Shape(num_requests=5, prompt_tokens=10, shared_prefix=100), 3, COUNT)
    prefix = " ".join(made[0].text.split()[:100])
    assert all(p.text.startswith(prefix + " ") and p.num_tokens == 110 for p in made)
    assert len({p.text for p in made}) == 5


def test_task_ends_every_prompt_that_has_room_for_it() -> None:
    made = build(Shape(num_requests=3, prompt_tokens=16, shared_prefix=20), 3, COUNT)
    assert all(p.text.endswith(" " + TASK) and p.num_tokens == 36 for p in made)
    assert TASK not in build(Shape(num_requests=1, prompt_tokens=15), 3, COUNT)[0].text


def test_mixed_lengths_lie_in_their_range_and_differ() -> None:
    lengths = [p.num_tokens for p in build(Shape(num_requests=40, mixed=(24, 60)), 1, COUNT)]
    assert min(lengths) >= 24
    assert max(lengths) <= 60
    assert len(set(lengths)) > 10


def test_poisson_arrivals_grow_and_have_the_asked_rate() -> None:
    made = build(Shape(num_requests=400, prompt_tokens=1, request_rate=5.0), 2, COUNT)
    arrivals = [p.arrival_s for p in made if p.arrival_s is not None]
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(5.0, rel=0.2)


def test_closed_loop_has_no_arrival_times() -> None:
    assert all(p.arrival_s is None for p in build(Shape(num_requests=3), 0, COUNT))


def test_words_are_distinct_and_plain() -> None:
    assert len(set(WORDS)) == len(WORDS) > 500
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize("text", ["600-24", "24", "0-5", "a-b"])
def test_bad_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_range(text)


def test_good_range() -> None:
    assert parse_range("24-600") == (24, 600)


@pytest.mark.parametrize(("answer", "number"), [({"count": 7}, 7), ({"tokens": [1, 2]}, 2)])
def test_server_counter_reads_both_answers(answer: dict[str, object], number: int) -> None:
    counter = ServerCounter("http://test", "default")
    counter.close()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
    counter._client = httpx.Client(transport=transport, base_url="http://test")
    assert counter("text") == number
    counter.close()


def test_estimates_where_no_server_answers() -> None:
    counter, close = choose_counter("http://127.0.0.1:9", "default", None)
    close()
    assert counter.source == "estimated"
