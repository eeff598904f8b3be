"""Incremental text equals the whole text and never holds a broken character."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from frontend.detokenize import Detokenizer
from frontend.pieces import Pieces
from frontend.tokenizer import ModelText
from tests.frontend.conftest import TOKENIZER, ids

TEXTS = [
    "plain English, it's 1234.",
    "日本語のテキストと漢字、한국어, 中文",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 and 👍🏽",
    "e\u0301 combining a\u0308o\u0323, \u0e01\u0e33 ไทย, हिन्दी",
    "code:\n\tif x:\r\n    return {}  # \x00 \x7f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \u200b\u202e end",
]


def parts(detokenizer: Detokenizer, lots: list[list[int]]) -> list[str]:
    return [*(detokenizer.feed(lot) for lot in lots), detokenizer.flush()]


@pytest.mark.embedded
@pytest.mark.parametrize("text", TEXTS)
def test_every_two_way_split_gives_the_text(text: str, embedded_text: ModelText) -> None:
    tokenizer, pieces = embedded_text.tokenizer, Pieces(embedded_text.tokenizer)
    token_ids = tokenizer.encode(text).ids
    for cut in range(len(token_ids) + 1):
        shown = parts(Detokenizer(tokenizer, pieces), [token_ids[:cut], token_ids[cut:]])
        assert "".join(shown) == text
        assert not any("\ufffd" in part for part in shown)
    assert "".join(parts(Detokenizer(tokenizer, pieces), [[i] for i in token_ids])) == text


@pytest.mark.embedded
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(token_ids=st.lists(st.integers(0, 49151), max_size=20))
def test_any_tokens_give_what_the_tokenizer_gives(token_ids: list[int], embedded_text: ModelText) -> None:
    tokenizer = embedded_text.tokenizer
    detokenizer = Detokenizer(tokenizer, Pieces(tokenizer))
    shown = parts(detokenizer, [[i] for i in token_ids])
    assert "".join(shown) == tokenizer.decode(token_ids, skip_special_tokens=True)
    for part in shown:
        part.encode()  # a lone surrogate or half a character would raise


@given(text=st.text(max_size=20), cuts=st.sets(st.integers(0, 80)))
def test_bytes_of_any_text_split_anywhere(text: str, cuts: set[int]) -> None:
    token_ids = ids(text)
    borders = [0, *sorted(cut for cut in cuts if cut <= len(token_ids)), len(token_ids)]
    lots = [token_ids[a:b] for a, b in pairwise(borders)]
    shown = parts(Detokenizer(TOKENIZER, Pieces(TOKENIZER)), lots)
    assert "".join(shown) == text


def test_a_character_that_never_ends_is_shown_as_one_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZER, Pieces(TOKENIZER))
    assert parts(detokenizer, [ids("ok"), ids("👍")[:3]]) == ["ok", "", "\ufffd"]


def test_special_tokens_show_only_when_asked_for() -> None:
    pieces = Pieces(TOKENIZER)
    assert Detokenizer(TOKENIZER, pieces).feed([1, *ids("x"), 2]) == "x"
    assert (
        Detokenizer(TOKENIZER, pieces, skip_special_tokens=False).feed([1, *ids("x"), 2]) == "<|im_start|>x<|im_end|>"
    )


def sentencepiece_like() -> Tokenizer:
    """Byte fallback and a word-border sign, as Llama 2 has them."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁hello", "hello", "w"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_byte_fallback_tokens_join_to_characters_and_a_turn_loses_its_first_space() -> None:
    tokenizer = sentencepiece_like()
    pieces = Pieces(tokenizer)
    token_ids = [258, *(1 + b for b in "é👍".encode()), 258]
    turn = parts(Detokenizer(tokenizer, pieces, is_text_start=True), [[i] for i in token_ids])
    assert "".join(turn) == tokenizer.decode(token_ids) == "helloé👍 hello"
    assert not any("\ufffd" in part for part in turn)
    assert "".join(parts(Detokenizer(tokenizer, pieces), [token_ids])) == " helloé👍 hello"


def test_a_decoder_of_another_kind_is_followed_by_windows() -> None:
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    token_ids = [0, 1, 2] * 8
    shown = parts(Detokenizer(tokenizer, Pieces(tokenizer)), [[i] for i in token_ids])
    assert "".join(shown) == tokenizer.decode(token_ids) == " ".join("abc" * 8)
