"""Tokens to text, incrementally: never a broken character, whatever the split."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer

from frontend.pieces import Pieces

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one sequence's output.

    Joining the tokens' bytes and decoding them as one UTF-8 stream costs about 1 microsecond a token; bytes of an
    unfinished character wait for the next token. Bytes that can never become valid give U+FFFD at once.

    Args:
        skip_special_tokens: special tokens show nothing.
        shown_ids: special tokens that show all the same, because a parser looks for them.
        is_text_start: the output begins a text of its own (an assistant's turn), so a SentencePiece vocabulary's
            leading space is not shown; a completion goes on with the prompt's text and keeps it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: Pieces,
        *,
        skip_special_tokens: bool = True,
        is_text_start: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = pieces
        self._hidden = pieces.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._decoder = _new_decoder("replace")
        self._skips_space = is_text_start and pieces.strips_first_space
        self._window = None if pieces.is_joinable else _Window(tokenizer)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        if self._window is not None:
            return self._window.feed([i for i in token_ids if i not in self._hidden])
        bytes_of, hidden = self._pieces.bytes_of, self._hidden
        text = self._decoder.decode(b"".join([bytes_of(i) for i in token_ids if i not in hidden]))
        return self._without_first_space(text) if self._skips_space else text

    def flush(self) -> str:
        """U+FFFD if the text ends inside a character, otherwise nothing."""
        if self._window is not None:
            return self._window.flush()
        return self._decoder.decode(b"", True)

    def _without_first_space(self, text: str) -> str:
        if text:
            self._skips_space = False
        return text.removeprefix(" ")


class _Window:
    """For decoders that look at neighbours: decode a window twice and emit the difference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens already shown, enough for the decoder to see a neighbour
        self._pending: list[int] = []

    def _difference(self) -> str:
        before: str = self._tokenizer.decode(self._context, skip_special_tokens=False)
        after: str = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)
        return after[len(before) :]

    def feed(self, token_ids: Sequence[int]) -> str:
        self._pending.extend(token_ids)
        text = self._difference()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context = (self._context + self._pending)[-8:]
        self._pending = []
        return text

    def flush(self) -> str:
        text = self._difference() if self._pending else ""
        self._pending = []
        return text
