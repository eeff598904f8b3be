"""Tokens of the parts of conversations, remembered: the next turn of a chat tokenizes only its new messages.

A chat template puts special tokens between messages, and a tokenizer takes those out of a text before anything else.
Where it then treats each part by itself, the tokens of a text are those of its parts, one behind the other. Whether it
does so is found out for each special token when the model is loaded; `cut_tokens` says how.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict

from tokenizers import AddedToken, Tokenizer

MAX_CHARS = 8 << 20  # that are remembered, of all tenants together; with their tokens about 16 MB
MIN_CHARS = 128  # a shorter part is tokenized again
# What stands left and right of a cut when it is tried: what tokenizers join, strip or mark.
SAMPLES = ("", "a", " a", "a ", "\n", "\n\nA1 b", "  x  ", "é漢字🙂", "don't", ".", "\t-", "12345")


class SegmentTokens:
    """Tokenizes long texts part by part. May be called from several threads.

    Args:
        max_chars: of the parts that are remembered; the least recently used go first.
    """

    def __init__(self, tokenizer: Tokenizer, max_chars: int = MAX_CHARS) -> None:
        self._tokenizer = tokenizer
        self._max_chars = max_chars
        self._ids = cut_tokens(tokenizer)
        texts = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None
        self._known: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()
        self.num_remembered_chars = 0  # that did not have to be tokenized

    def encode(self, text: str, tenant: str) -> list[int]:
        """The text's tokens, none added. What one tenant sent makes no other's text faster.

        Raises:
            TypeError, UnicodeEncodeError: the text has a lone surrogate.
        """
        if self._pattern is None:
            return self._tokens([text])[0]
        parts = self._pattern.split(text)
        known = self._find(tenant, parts)
        missing = [i for i, part in enumerate(parts) if part and known[i] is None]
        for i, ids in zip(missing, self._tokens([parts[i] for i in missing]), strict=True):
            known[i] = array("I", ids)
        self._keep(tenant, [(parts[i], known[i]) for i in missing])
        return [token_id for part in known if part is not None for token_id in part]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [one.ids for one in encoded]

    def _find(self, tenant: str, parts: list[str]) -> list[array[int] | None]:
        """By part; special tokens are known."""
        found: list[array[int] | None] = []
        with self._lock:
            for part in parts:
                if (token_id := self._ids.get(part)) is not None:
                    found.append(array("I", [token_id]))
                    continue
                ids = self._known.get((tenant, part)) if len(part) >= MIN_CHARS else None
                if ids is not None:
                    self._known.move_to_end((tenant, part))
                    self.num_remembered_chars += len(part)
                found.append(ids)
        return found

    def _keep(self, tenant: str, parts: list[tuple[str, array[int] | None]]) -> None:
        with self._lock:
            for part, ids in parts:
                if ids is None or not MIN_CHARS <= len(part) <= self._max_chars or (tenant, part) in self._known:
                    continue
                self._known[tenant, part] = ids
                self._num_chars += len(part)
            while self._num_chars > self._max_chars:
                (_, part), _ = self._known.popitem(last=False)
                self._num_chars -= len(part)


def cut_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> id of the special tokens at which a text may be cut.

    Left out: those that swallow white space or stand only beside it, those that overlap with another added token, so
    that it depends on what stands around which of the two is meant, and those around which samples come out otherwise.
    """
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    texts = [token.content for token in added.values()]
    return {
        token.content: token_id
        for token_id, token in added.items()
        if token.special
        and token.content
        and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and not any(_overlap(token.content, other) for other in texts if other != token.content)
        and _parts_stand_alone(tokenizer, token.content, token_id)
    }


def _overlap(text: str, other: str) -> bool:
    """Can both be found in one text at places that are not apart?"""
    if text in other or other in text:
        return True
    sizes = range(1, min(len(text), len(other)))
    return any(other.endswith(text[:n]) or text.endswith(other[:n]) for n in sizes)


def _parts_stand_alone(tokenizer: Tokenizer, text: str, token_id: int) -> bool:
    alone = [one.ids for one in tokenizer.encode_batch_fast(list(SAMPLES), add_special_tokens=False)]
    pairs = [(i, j) for i in range(len(SAMPLES)) for j in range(len(SAMPLES))]
    joined = tokenizer.encode_batch_fast([SAMPLES[i] + text + SAMPLES[j] for i, j in pairs], add_special_tokens=False)
    return all(one.ids == [*alone[i], token_id, *alone[j]] for (i, j), one in zip(pairs, joined, strict=True))
