"""Grammars over a model's vocabulary, by llguidance: checked in the frontend, followed in the target worker."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from shared.errors import InvalidRequest
from shared.messages import Grammar

# Unbounded space between two JSON values would let a model write nothing else until its limit.
JSON_SPACE = r"[ \n\r\t]{1,64}"
MAX_COMPILED = 64  # grammars that a compiler keeps; a conversation sends the same one again and again


def json_schema(schema: dict[str, Any], *, is_lenient: bool = False, escapes: str | None = None) -> dict[str, Any]:
    """`schema` with the options that all JSON of ours is compiled with.

    Args:
        is_lenient: keywords that are not supported are ignored instead of refused.
        escapes: letters that may follow a backslash in strings; None for all of JSON's.
    """
    options: dict[str, Any] = {"whitespace_pattern": JSON_SPACE, "lenient": is_lenient}
    if escapes is not None:
        options["json_allowed_escapes"] = escapes
    return {**schema, "x-guidance": options}


class Compiler:
    """Compiles grammars for one vocabulary. One thread at a time.

    Args:
        vocab_size: rows of the model's logits, at least as many as the tokenizer has tokens.
        eos_token_ids: may follow a complete answer, and nothing else may.

    Raises:
        InvalidRequest: the tokenizer cannot be used with grammars, or no token ends an output.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self.eos_token_ids = sorted(set(eos_token_ids))
        if not self.eos_token_ids:
            raise InvalidRequest("grammars need a token that ends the output; this model names none")
        self.vocab_size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        try:
            self._vocabulary = LLTokenizer(tokenizer.to_str(), n_vocab=self.vocab_size, eos_token=self.eos_token_ids)
        except ValueError as error:
            raise InvalidRequest(f"grammars cannot be used with this model's tokenizer: {error}") from error
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the grammar's beginning.

        Raises:
            InvalidRequest: the grammar does not parse, has keywords that are not supported, or is too large.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = LLMatcher(self._vocabulary, self._source(grammar), log_level=0)
            if compiled.is_error():
                raise InvalidRequest(reason(compiled.get_error()))
            if len(self._compiled) >= MAX_COMPILED:
                self._compiled.popitem(last=False)
            self._compiled[grammar] = compiled
        self._compiled.move_to_end(grammar)
        return compiled.deep_copy()

    @staticmethod
    def _source(grammar: Grammar) -> str:
        match grammar.kind:
            case "json_object":
                return str(LLMatcher.grammar_from_json_schema(json_schema({"type": "object"})))
            case "json_schema":
                return str(LLMatcher.grammar_from_json_schema(json_schema(_schema(grammar.text))))
            case "regex":
                return str(LLMatcher.grammar_from_regex(grammar.text))
            case "lark":
                return str(LLMatcher.grammar_from_lark(grammar.text))

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the text; a special token's own text."""
        return bytes(self._vocabulary.decode_bytes([token_id]))

    def token_id(self, text: str) -> int | None:
        """The one token with this text, if there is one."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id

    def is_special(self, token_id: int) -> bool:
        """Whether the token is none of text's: a grammar has to name it."""
        return bool(self._vocabulary.is_special_token(token_id))


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise InvalidRequest("the schema is not an object")
    return schema


def reason(error: str) -> str:
    """The library's message without the copy of the grammar that follows it."""
    lines = [line.strip() for line in error.split("\n<state>")[0].splitlines()]
    return " ".join(line for line in lines if line and set(line) != {"^"})[:500]
