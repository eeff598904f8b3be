"""What generating gives: pieces of an output as they come, or the whole of it, with its counters."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from shared import model_json


class Stats(Struct, frozen=True, kw_only=True):
    """Counters of one output so far, from the scheduler. Durations are seconds, on the engine's own clock."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_output_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0  # until the first token
    decode_s: float = 0.0  # since then
    peak_memory_bytes: int = 0  # the most that arrays of this process have held since it began

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens computed, those of the prefix cache left out."""
        return (self.num_prompt_tokens - self.num_cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: the first token belongs to the prefill."""
        return max(0, self.num_output_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted of drafted tokens; None where none were drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None


class Token(Struct, frozen=True, kw_only=True):
    """One output token with its log-probability, from the model's own distribution before any sampling parameter."""

    token_id: int
    text: str  # "\N{REPLACEMENT CHARACTER}" where the token is part of a character
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # (token id, log-probability), most likely first


class ToolCall(Struct, frozen=True, kw_only=True):
    """A complete call; `arguments` is the text of a JSON object."""

    call_id: str
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """The arguments as a dict. Models write what they like: numbers beyond a float's range are infinite."""
        found: dict[str, Any] = model_json.decode(self.arguments)
        return found


class Piece(Struct, frozen=True, kw_only=True):
    """What one step of the engine adds to one output. Text may be empty: a character can take several tokens."""

    index: int = 0  # of the prompt
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)  # several where drafts were accepted
    tokens: list[Token] = field(default_factory=list)  # only with `logprobs`
    tool_calls: list[ToolCall] = field(default_factory=list)  # those that this piece completes
    finish_reason: str | None = None  # "stop", "length" or "tool_calls", in an output's last piece
    stats: Stats = Stats()


class Result(Struct, frozen=True, kw_only=True):
    """A whole output."""

    text: str
    reasoning: str
    token_ids: list[int]
    tokens: list[Token]
    tool_calls: list[ToolCall]
    finish_reason: str | None  # None: it was stopped before its end
    stats: Stats


def joined(pieces: list[Piece]) -> Result:
    """The pieces of one output as a whole."""
    return Result(
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        tokens=[token for piece in pieces for token in piece.tokens],
        tool_calls=[call for piece in pieces for call in piece.tool_calls],
        finish_reason=pieces[-1].finish_reason if pieces else None,
        stats=pieces[-1].stats if pieces else Stats(),
    )
