"""How models mark what they think before they answer."""

from __future__ import annotations

from msgspec import Struct
from tokenizers import Tokenizer

from shared.errors import BadConfig


class ReasoningFormat(Struct, frozen=True):
    name: str
    start: str
    end: str

    def is_open(self, prompt: str) -> bool:
        """Whether the template itself has begun the reasoning: then the output starts inside it."""
        return prompt.rstrip().endswith(self.start.rstrip())

    def is_closed(self, prompt: str) -> bool:
        """Whether the template itself has written reasoning's end, as those do that can turn it off."""
        return prompt.rstrip().endswith(self.end.rstrip())


# Gemma comes before the others: its marker is the most particular.
_FORMATS = (
    ReasoningFormat("gemma4", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("think", "<think>", "</think>"),
)


def choose(name: str, template: str, tokenizer: Tokenizer, start: str = "", end: str = "") -> ReasoningFormat | None:
    """The format called `name`; without a name the one whose end marker is in the template or the vocabulary.

    Args:
        start, end: markers to use instead of the format's; both where there is no format.

    Raises:
        BadConfig: no such format, or one marker alone.
    """
    known = _known(name, template, tokenizer)
    if not start and not end:
        return known
    if known is None and not (start and end):
        raise BadConfig("TANDEM_THINKING_START_TOKEN and TANDEM_THINKING_END_TOKEN: this model needs both")
    return ReasoningFormat("settings", start or (known.start if known else ""), end or (known.end if known else ""))


def _known(name: str, template: str, tokenizer: Tokenizer) -> ReasoningFormat | None:
    if name == "none":
        return None
    if not name:
        marked = (f for f in _FORMATS if f.end in template or tokenizer.token_to_id(f.end) is not None)
        return next(marked, None)
    for known in _FORMATS:
        if known.name == name:
            return known
    names = ", ".join([*(f.name for f in _FORMATS), "none"])
    raise BadConfig(f"TANDEM_REASONING_PARSER: {name!r} is none of {names}")
