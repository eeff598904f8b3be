"""Drafts without a model: tokens that followed the same words before, in this sequence or in recent outputs.

`NgramIndex` looks into one sequence (prompt lookup: what a prompt says is often said again, edits most of all).
`SharedSuffixIndex` looks into the recent outputs of a tenant's requests (agents repeat themselves). Both cost O(1) per
token and hold a bounded number of entries. A proposal is only a guess; the target verifies it.

Sources: Saxena 2023, prompt lookup decoding; Oliaro et al. 2024, arXiv:2411.04975, suffix decoding.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shared.messages import RequestId

MAX_MATCH = 64  # tokens compared backwards; a longer match is no better evidence


class Proposal(NamedTuple):
    """Draft tokens; empty when nothing matched."""

    token_ids: list[int]
    match_length: int  # tokens before the draft that equal those before the source, at most MAX_MATCH
    confidence: float  # estimated chance of the first token: Laplace's rule on the match, times the vote of the sources


NOTHING = Proposal([], 0, 0.0)


class NgramIndex:
    """The latest earlier occurrence of a growing sequence's last n tokens, longest n first.

    For each n there is a table from n-gram to the position after its latest occurrence that is followed by a token.
    """

    def __init__(
        self, min_n: int = 1, max_n: int = 5, max_positions: int = 32_768, max_draft_per_match: float = 2.0
    ) -> None:
        """`max_positions`: how far back occurrences are remembered; (max_n - min_n + 1) entries each."""
        if not 1 <= min_n <= max_n:
            raise ValueError(f"n-grams of {min_n} to {max_n} tokens")
        self.tokens: list[int] = []
        self._min_n = min_n
        self._max_n = max_n
        self._max_positions = max_positions
        self._max_draft_per_match = max_draft_per_match
        self._after: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(min_n, max_n + 1)}

    def append(self, token: int) -> None:
        """Add one committed token; the n-grams before it now have a continuation."""
        at = len(self.tokens)
        for n, table in self._after.items():
            if at >= n:
                table[tuple(self.tokens[at - n : at])] = at
            old = at - self._max_positions
            if old >= n:
                key = tuple(self.tokens[old - n : old])
                if table.get(key) == old:
                    del table[key]
        self.tokens.append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add many tokens, a prompt's: half of the time of adding each."""
        at = len(self.tokens)
        self.tokens += tokens
        end = len(self.tokens)
        oldest = end - self._max_positions  # that is remembered
        for n, table in self._after.items():
            for old in range(max(n, at - self._max_positions), min(at, oldest)):
                key = tuple(self.tokens[old - n : old])
                if table.get(key) == old:
                    del table[key]
            first = max(at, n, oldest)
            if first < end:
                ngrams = zip(*(self.tokens[first - n + i : end - n + i] for i in range(n)), strict=True)
                table.update(zip(ngrams, range(first, end), strict=True))

    @property
    def num_entries(self) -> int:
        return sum(len(table) for table in self._after.values())

    def propose(self, max_tokens: int) -> Proposal:
        """Up to `max_tokens` tokens that followed the latest occurrence of the longest known n-gram.

        A source that runs into the sequence's end repeats itself: after "a b a b" comes "a b a b ...".
        """
        length = len(self.tokens)
        for n in range(min(self._max_n, length - 1), self._min_n - 1, -1):
            source = self._after[n].get(tuple(self.tokens[length - n :]))
            if source is None:
                continue
            match = _match_length(self.tokens, source, self.tokens)
            count = min(max_tokens, int(match * self._max_draft_per_match))
            period = length - source
            drafted = [self.tokens[source + i % period] for i in range(count)]
            return Proposal(drafted, match, (match + 1) / (match + 2)) if drafted else NOTHING
        return NOTHING


class _Output:
    """A request's output so far."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.tokens: list[int] = []


class SharedSuffixIndex:
    """Recent outputs of all requests, found by their n-grams; least recently written requests are forgotten first.

    The sources of a proposal vote token by token, those that lose drop out, and the draft ends where its estimated
    probability falls under `min_probability`. Tenants do not see each other: even a rejected draft changes timing.
    """

    def __init__(
        self,
        n: int = 3,
        max_tokens: int = 200_000,
        max_sources: int = 8,
        max_draft_per_match: float = 1.0,
        min_probability: float = 0.1,
    ) -> None:
        self._n = n
        self._max_tokens = max_tokens
        self._max_sources = max_sources
        self._max_draft_per_match = max_draft_per_match
        self._min_probability = min_probability
        self._outputs: OrderedDict[RequestId, _Output] = OrderedDict()  # least recently written first
        self._sources: dict[tuple[str, tuple[int, ...]], deque[tuple[RequestId, int]]] = {}
        self.num_tokens = 0

    def append(self, request_id: RequestId, tokens: Iterable[int], tenant: str = "") -> None:
        """Add committed output tokens of a request, making room first."""
        output = self._outputs.setdefault(request_id, _Output(tenant))
        self._outputs.move_to_end(request_id)
        for token in tokens:
            while self.num_tokens >= self._max_tokens and len(self._outputs) > 1:
                self.forget(next(iter(self._outputs)))
            if self.num_tokens >= self._max_tokens:
                return  # this output alone fills the index
            at = len(output.tokens)
            if at >= self._n:
                key = (output.tenant, tuple(output.tokens[at - self._n : at]))
                sources = self._sources.setdefault(key, deque(maxlen=self._max_sources))
                sources.append((request_id, at))
            output.tokens.append(token)
            self.num_tokens += 1

    def forget(self, request_id: RequestId) -> None:
        output = self._outputs.pop(request_id, None)
        if output is None:
            return
        self.num_tokens -= len(output.tokens)
        for at in range(self._n, len(output.tokens)):
            key = (output.tenant, tuple(output.tokens[at - self._n : at]))
            sources = self._sources.get(key)
            if sources is not None and (request_id, at) in sources:  # a full deque has dropped it already
                sources.remove((request_id, at))
                if not sources:
                    del self._sources[key]

    def propose(self, context: Sequence[int], max_tokens: int, tenant: str = "") -> Proposal:
        """Continue `context` (prompt and output of a request) as recent outputs did after the same tokens.

        Only the sources with the longest match vote.
        """
        found = self._sources.get((tenant, tuple(context[-self._n :])))
        if not found or len(context) < self._n:
            return NOTHING
        matches = []
        for request_id, at in found:
            tokens = self._outputs[request_id].tokens
            if at < len(tokens):
                matches.append((_match_length(tokens, at, context), tokens, at))
        longest = max(match for match, _, _ in matches)
        voters = [(tokens, at) for match, tokens, at in matches if match == longest]
        drafted: list[int] = []
        first, probability = 0.0, (longest + 1) / (longest + 2)
        while voters and len(drafted) < min(max_tokens, int(longest * self._max_draft_per_match)):
            votes: dict[int, int] = {}
            for tokens, at in voters:
                votes[tokens[at]] = votes.get(tokens[at], 0) + 1
            token = max(votes, key=votes.__getitem__)
            probability *= votes[token] / len(voters)
            if probability < self._min_probability:
                break
            first = first or probability
            drafted.append(token)
            voters = [(tokens, at + 1) for tokens, at in voters if tokens[at] == token and at + 1 < len(tokens)]
        return Proposal(drafted, longest, first) if drafted else NOTHING

    def check_integrity(self) -> None:
        """Counts agree and every source points at the n-gram that it is filed under."""
        assert self.num_tokens == sum(len(o.tokens) for o in self._outputs.values()), "token count"
        assert self.num_tokens <= self._max_tokens, "over the bound"
        for (tenant, key), sources in self._sources.items():
            assert 0 < len(sources) <= self._max_sources, "an empty or overlong list of sources"
            for request_id, at in sources:
                output = self._outputs[request_id]
                assert output.tenant == tenant, "a source of another tenant"
                assert tuple(output.tokens[at - self._n : at]) == key, "a source under the wrong n-gram"
                assert at < len(output.tokens), "a source without a continuation"


def _match_length(tokens: Sequence[int], at: int, context: Sequence[int]) -> int:
    """How many tokens before position `at` of `tokens` equal the last ones of `context`, at most MAX_MATCH."""
    length = 0
    while length < min(at, len(context), MAX_MATCH) and tokens[at - 1 - length] == context[-1 - length]:
        length += 1
    return length
