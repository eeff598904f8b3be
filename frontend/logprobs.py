"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from frontend.generation import TokenText
from frontend.pieces import Pieces

# JSON has no infinity; OpenAI's API writes this for a token that cannot come.
_IMPOSSIBLE = -9999.0


def chat_entries(tokens: Iterable[TokenText], pieces: Pieces) -> list[dict[str, Any]]:
    return [
        _chat_entry(token.token_id, token.logprob.logprob, pieces)
        | {"top_logprobs": [_chat_entry(top.token_id, top.logprob, pieces) for top in token.logprob.top]}
        for token in tokens
    ]


def _chat_entry(token_id: int, logprob: float, pieces: Pieces) -> dict[str, Any]:
    piece = pieces.bytes_of(token_id)
    return {"token": piece.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(piece)}


def completion_block(tokens: Iterable[TokenText], pieces: Pieces) -> dict[str, list[Any]]:
    """Parallel lists. Tokens that are part of a character are written "bytes:\\xe2\\x80", as OpenAI does."""
    block: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        block["tokens"].append(_name(token.token_id, pieces))
        block["token_logprobs"].append(_finite(token.logprob.logprob))
        block["top_logprobs"].append({_name(t.token_id, pieces): _finite(t.logprob) for t in token.logprob.top})
        block["text_offset"].append(token.offset)
    return block


def _name(token_id: int, pieces: Pieces) -> str:
    piece = pieces.bytes_of(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float) -> float:
    return logprob if logprob > _IMPOSSIBLE else _IMPOSSIBLE  # false for NaN too
