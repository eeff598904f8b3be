"""Where each output token came from: the target, or a draft that it accepted.

An answer tells it on request (`return_token_origins`), so that people can see what a drafter does for their texts.
"""

from __future__ import annotations

from msgspec import Struct

from shared.messages import Output

TARGET = "target"
UNKNOWN = "unknown"


class TokenOrigin(Struct, frozen=True):
    """`text` is what the token showed; empty where it completes no character, or ends the output."""

    text: str
    origin: str  # "target", "unknown", or the kind of the drafter that proposed it, as metrics name it


class DraftCounts:
    """Drafted tokens of one sequence so far, those of its origins."""

    def __init__(self) -> None:
        self.num_draft_tokens = 0
        self.num_accepted = 0

    def add(self, output: Output) -> None:
        if output.verified is not None:
            self.num_draft_tokens += output.verified.num_draft_tokens
            self.num_accepted += output.verified.num_accepted


def origins_of(output: Output) -> list[str]:
    """The origin of each of an Output's tokens."""
    num_tokens = len(output.token_ids)
    if output.is_repeated:
        return [UNKNOWN] * num_tokens
    if output.verified is None:
        return [TARGET] * num_tokens
    num_drafted = min(output.verified.num_accepted, num_tokens)
    return [output.verified.drafter] * num_drafted + [TARGET] * (num_tokens - num_drafted)
