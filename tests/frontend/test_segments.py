"""Tokens put together out of remembered parts are those of the whole text, for tokenizers of every kind."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from frontend.segments import MIN_CHARS, SegmentTokens, cut_tokens

START, END = "<|im_start|>", "<|im_end|>"
TRAINING = [
    "The quick brown fox jumps over the lazy dog. 12345\n\n  indented é漢字",
    "don't stop  a\tb user assistant",
] * 20


def byte_level(special: list[AddedToken] | None = None, *, adds_space: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TRAINING, trainer)
    added = special or [AddedToken(text, special=True) for text in (START, END)]
    made.add_tokens([token for token in added if not token.special])
    made.add_special_tokens([token for token in added if token.special])
    return made


def marked(scheme: str) -> Tokenizer:
    """Spaces become marks, as in the tokenizers of Llama 2 and Mistral."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(TRAINING, trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in (START, END)])
    return made


def normalised() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_"), normalizers.Lowercase()])
    return made


KINDS = {
    "byte level": byte_level, "byte level, adds a space": lambda: byte_level(adds_space=True),
    "marked always": lambda: marked("always"), "marked never": lambda: marked("never"), "normalised": normalised,
}  # fmt: skip
MADE = {name: make() for name, make in KINDS.items()}
PIECES = st.sampled_from(
    [
        START,
        END,
        " ",
        "\n",
        "user",
        "The quick",
        " brown",
        "é",
        "漢字",
        "🙂",
        "don't ",
        "  x",
        "<|",
        "im_start|>",
        "12345",
    ]
)


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_at_special_tokens_where_parts_stand_alone(kind: str) -> None:
    assert set(cut_tokens(MADE[kind])) - {"<unk>"} == {START, END}


def test_nothing_is_cut_where_only_the_first_part_gets_a_mark() -> None:
    tokenizer = marked("first")
    assert cut_tokens(tokenizer) == {}
    text = f"a b{START}c d{END}" + "e " * MIN_CHARS
    assert SegmentTokens(tokenizer).encode(text, "") == whole(tokenizer, text)


@pytest.mark.parametrize(
    "token",
    [
        AddedToken(START, special=True, rstrip=True), AddedToken(START, special=True, lstrip=True),
        AddedToken(START, special=True, single_word=True), AddedToken(START, special=True, normalized=True),
        AddedToken(START, special=False),
    ],
    ids=["strips right", "strips left", "a word by itself", "normalised", "not special"],
)  # fmt: skip
def test_a_token_that_depends_on_what_stands_beside_it_cuts_nothing(token: AddedToken) -> None:
    assert START not in cut_tokens(byte_level([token, AddedToken(END, special=True)]))


def test_tokens_that_overlap_cut_nothing() -> None:
    tokens = ["<a>", "x<a>", "<b", "b>", "<c>"]
    assert set(cut_tokens(byte_level([AddedToken(text, special=True) for text in tokens]))) == {"<c>"}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.lists(PIECES, max_size=30), min_size=1, max_size=5))
def test_growing_conversations_have_the_tokens_of_the_whole_text(kind: str, turns: list[list[str]]) -> None:
    tokenizer, text = MADE[kind], ""
    encoder = SegmentTokens(tokenizer, max_chars=600)
    for turn in turns:
        text += START + "".join(turn) * 8 + END
        assert encoder.encode(text, "") == whole(tokenizer, text)


def test_what_was_said_is_tokenized_once_and_for_its_tenant_only() -> None:
    encoder = SegmentTokens(MADE["byte level"])
    parts = [f"{i} The quick brown fox " * 20 for i in range(5)]
    text = "".join(START + part + END for part in parts[:4])
    encoder.encode(text, "a")
    assert encoder.num_remembered_chars == 0
    encoder.encode(text + START + parts[4] + END, "a")
    assert encoder.num_remembered_chars == sum(map(len, parts[:4]))
    encoder.encode(text, "b")
    assert encoder.num_remembered_chars == sum(map(len, parts[:4]))


def test_the_least_recently_used_parts_go_first() -> None:
    first, second, third = (str(i) * MIN_CHARS for i in range(3))
    encoder = SegmentTokens(MADE["byte level"], max_chars=2 * MIN_CHARS)
    for part in (first, second, first, third):
        encoder.encode(START + part, "")
    assert encoder.num_remembered_chars == MIN_CHARS
    encoder.encode(START + second, "")
    assert encoder.num_remembered_chars == MIN_CHARS, "it made room for the third"
    assert encoder._num_chars <= 2 * MIN_CHARS


def test_a_lone_surrogate_is_an_error_as_without_parts() -> None:
    encoder = SegmentTokens(MADE["byte level"])
    with pytest.raises((TypeError, UnicodeEncodeError)):
        encoder.encode(START + "\ud800" * MIN_CHARS, "")


def test_several_threads_get_the_tokens_of_their_own_texts() -> None:
    encoder, tokenizer = SegmentTokens(MADE["byte level"], max_chars=3000), MADE["byte level"]
    rng = random.Random(1)
    texts = [START.join(f"{rng.random()} fox " * rng.randrange(5, 40) for _ in range(6)) for _ in range(8)]
    expected = [whole(tokenizer, text) for text in texts]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if encoder.encode(texts[i], str(i % 2)) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
