"""Which tokens one sequence may put out next: a grammar for its answer, a budget for its reasoning.

A constraint follows the tokens that the sequence has put out. For a verify it also tells the masks at the drafted
positions, on a copy that takes the drafts as if they were accepted; what a mask forbids is never drawn, so such a draft
is never accepted. Built again from the output tokens after a preemption or a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from shared.errors import InvalidRequest
from shared.grammar import Compiler, reason
from shared.messages import Grammar, Thinking

Mask = NDArray[np.uint32]  # (ceil(V / 32),): bit t % 32 of word t // 32 is set where token t may come
MAX_CHAR_BYTES = 4  # of UTF-8


class Phase(Enum):
    OPENING = auto()  # nothing but space, or a part of the marker that opens reasoning, was put out
    REASONING = auto()
    CLOSING = auto()  # the budget is spent: the end marker is being written
    ANSWER = auto()


@dataclass
class _State:
    """What changes with every token, beside the matcher."""

    phase: Phase
    text: bytes = b""  # OPENING: all of it; REASONING: as much of its end as a marker needs
    num_tokens: int = 0  # OPENING: of the marker; REASONING: of the reasoning; CLOSING: of the end marker


class Constraint:
    """Raises InvalidRequest: the grammar does not compile."""

    def __init__(self, compiler: Compiler, grammar: Grammar | None, thinking: Thinking | None) -> None:
        self.error: str | None = None  # set once the output has left the grammar; nothing is masked any more
        self._compiler = compiler
        self._thinking = thinking
        self._matcher: LLMatcher | None = compiler.matcher(grammar) if grammar is not None else None
        if thinking is None:
            self._state = _State(Phase.ANSWER)
        else:
            self._start, self._end = thinking.start.encode(), thinking.end.encode()
            self._state = _State(Phase.OPENING if thinking.start else Phase.REASONING)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens that the sequence has put out."""
        for token_id in token_ids:
            if self.error is None and not self._take(token_id):
                self.error = self._fault(None) or f"token {token_id} does not continue the grammar"

    def masks(self, drafts: Sequence[int]) -> list[Mask | None]:
        """Masks (k+1) for the position after the output and after each draft; None allows every token.

        Behind a draft that the grammar forbids there is no mask: that draft is not accepted, so nothing there counts.
        """
        if self.error is not None:
            return [None] * (len(drafts) + 1)
        masks: list[Mask | None] = [self._mask()]
        self.error = self._fault(masks[0])
        kept = self._state, self._matcher
        self._state = replace(self._state)
        if self._matcher is not None:
            self._matcher = self._matcher.deep_copy()
        for draft in drafts:
            mask = masks[-1]
            if self._fault(mask) or (mask is not None and not _allows(mask, draft)) or not self._take(draft):
                break
            masks.append(self._mask())
        self._state, self._matcher = kept
        return masks + [None] * (len(drafts) + 1 - len(masks))

    # ------------------------------------------------ one token

    def _take(self, token_id: int) -> bool:
        """False where the answer's grammar does not go on with this token."""
        match self._state.phase:
            case Phase.OPENING:
                return self._take_opening(token_id)
            case Phase.REASONING:
                self._think(self._compiler.bytes_of(token_id))
                return True
            case Phase.CLOSING:
                assert self._thinking is not None, "only reasoning is closed"
                self._state.num_tokens += 1
                if self._state.num_tokens == len(self._thinking.end_token_ids):
                    self._state = _State(Phase.ANSWER)
                return True
            case Phase.ANSWER:
                return self._matcher is None or self._take_answer(self._matcher, token_id)

    def _take_answer(self, matcher: LLMatcher, token_id: int) -> bool:
        if matcher.is_stopped():  # complete: an end token may follow, and a second one where the first did not end it
            return token_id in self._compiler.eos_token_ids
        return bool(matcher.consume_token(token_id))

    def _take_opening(self, token_id: int) -> bool:
        """The output's first tokens: the marker that opens reasoning, or the answer at once."""
        state = self._state
        assert self._thinking is not None, "without reasoning there is only the answer"
        if self._matcher is not None:
            marker = self._thinking.start_token_ids
            if self._offers_start and token_id == marker[state.num_tokens]:
                state.num_tokens += 1
                if state.num_tokens == len(marker):
                    self._state = _State(Phase.REASONING)
                return True
            self._state = _State(Phase.ANSWER)
            return self._take_answer(self._matcher, token_id)
        state.text += self._compiler.bytes_of(token_id)
        text = state.text.lstrip()
        if text.startswith(self._start):
            self._state = _State(Phase.REASONING)
            self._think(text[len(self._start) :], num_tokens=0)
        elif not self._start.startswith(text):
            self._state = _State(Phase.ANSWER)
        return True

    def _think(self, piece: bytes, num_tokens: int = 1) -> None:
        """Reasoning goes on with `piece`: it may end there, or use up its budget."""
        state, thinking = self._state, self._thinking
        assert thinking is not None, "the budget is the reasoning's"
        state.num_tokens += num_tokens
        state.text += piece
        if self._end in state.text:
            self._state = _State(Phase.ANSWER)
            return
        state.text = state.text[-max(len(self._end) - 1, MAX_CHAR_BYTES) :]
        if thinking.budget is not None and state.num_tokens >= thinking.budget and not _ends_inside(state.text):
            self._state = _State(Phase.CLOSING)

    # ------------------------------------------------ masks

    def _mask(self) -> Mask | None:
        state = self._state
        if state.phase is Phase.REASONING:
            return None
        if state.phase is Phase.CLOSING:
            assert self._thinking is not None, "only reasoning is closed"
            return self._only(self._thinking.end_token_ids[state.num_tokens])
        if self._matcher is None:
            return None
        if state.phase is Phase.OPENING and self._thinking is not None:
            marker = self._thinking.start_token_ids
            if state.num_tokens:
                return self._only(marker[state.num_tokens])
            if self._offers_start:
                return self._grammar_mask(self._matcher) | self._only(marker[0])
        return self._grammar_mask(self._matcher)

    @property
    def _offers_start(self) -> bool:
        """Whether reasoning may begin: not with a marker of several tokens whose first the grammar wants for itself."""
        assert self._thinking is not None and self._matcher is not None, "asked for while opening"
        marker = self._thinking.start_token_ids
        if not marker or self._state.num_tokens:
            return bool(marker)
        return len(marker) == 1 or not _allows(self._grammar_mask(self._matcher), marker[0])

    def _grammar_mask(self, matcher: LLMatcher) -> Mask:
        return np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)

    def _fault(self, mask: Mask | None) -> str | None:
        """Why the sequence cannot go on, with this mask before its next token."""
        if self._matcher is not None and self._matcher.is_error():
            return reason(self._matcher.get_error())
        return "the grammar allows no token here" if mask is not None and not mask.any() else None

    def _only(self, token_id: int) -> Mask:
        mask = np.zeros((self._compiler.vocab_size + 31) // 32, np.uint32)
        mask[token_id // 32] = np.uint32(1 << token_id % 32)
        return mask


def start(
    compiler: Compiler | None, grammar: Grammar | None, thinking: Thinking | None, output_token_ids: Sequence[int]
) -> Constraint | None:
    """The constraint of a sequence that has put out these tokens; None where there is nothing to constrain.

    Raises:
        InvalidRequest: the grammar does not compile, or this model cannot be used with one.
    """
    if grammar is None and thinking is None:
        return None
    if compiler is None:
        raise InvalidRequest("this model's tokenizer cannot be used with grammars and budgets")
    constraint = Constraint(compiler, grammar, thinking)
    constraint.advance(output_token_ids)
    return constraint


def _allows(mask: Mask, token_id: int) -> bool:
    return bool(mask[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))


def _ends_inside(text: bytes) -> bool:
    """Whether the last character of UTF-8 `text` is not complete yet: a marker there would break it."""
    for length in range(1, min(len(text), MAX_CHAR_BYTES) + 1):
        byte = text[-length]
        if byte & 0xC0 != 0x80:  # the character's first byte
            return length < (1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return False
