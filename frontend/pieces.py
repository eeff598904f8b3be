"""The bytes that each token stands for, worked out once per token and kept."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer


def _byte_of_char() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte.

    Source: bytes_to_unicode of GPT-2's encoder: printable Latin-1 stands for itself, the rest follows from U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_of_char()


class Pieces:
    """Token id -> bytes, so that any sequence of tokens decodes by joining.

    `is_joinable` is False for decoders that are neither byte-level nor SentencePiece-like (a word-level test tokenizer,
    say): there a token's text depends on its neighbours and `bytes_of` gives only what it is alone.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The decoder's own state, not to_str(): that one writes out the whole vocabulary.
        decoder = tokenizer.decoder
        steps = _decoder_steps(json.loads(decoder.__getstate__()) if decoder is not None else None)
        kinds = {step["type"] for step in steps}
        self._is_byte_level = kinds == {"ByteLevel"}
        self._is_metaspace = bool(kinds) and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        self.is_joinable = self._is_byte_level or self._is_metaspace
        # Such decoders drop one space at the very beginning of a text.
        self.strips_first_space = "Strip" in kinds or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
        )
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {}
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def bytes_of(self, token_id: int) -> bytes:
        """Special tokens give their written form; an id outside the vocabulary gives nothing."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._find(token_id)
        return piece

    def _find(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if self._is_byte_level:
            codes = [_BYTES.get(char) for char in token]
            known = [code for code in codes if code is not None]
            return bytes(known) if len(known) == len(codes) else token.encode()
        if self._is_metaspace:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    return bytes([int(token[3:5], 16)])
                except ValueError:
                    pass  # only looks like a byte token
            return token.replace("▁", " ").encode()
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _decoder_steps(step)]
    return [decoder]
