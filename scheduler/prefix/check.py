"""The self-check: an idle target computes a hit's tokens again, and blocks that differ from what is cached are dropped.

It runs in a slot of its own, one prefill chunk at a time, and gives way to any request.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.prefix.cache import PrefixCache, ToCheck
from shared.messages import BlockStore, RequestId, SamplingParams, SequenceStart, Step, StepRow


@dataclass
class SelfCheck:
    """One hit, of whose tokens `num_computed` are on their way."""

    slot: int
    capacity: int
    hit: ToCheck
    num_computed: int = 0

    @property
    def is_done(self) -> bool:
        return self.num_computed == len(self.hit.token_ids)

    def next_step(self, epoch: int, step_id: int, max_tokens: int, prefix: PrefixCache) -> Step:
        """The next chunk; the last one brings the comparison."""
        first = self.num_computed
        tokens = self.hit.token_ids[first : first + max_tokens]
        self.num_computed += len(tokens)
        start = SequenceStart(
            slot=self.slot,
            request_id=RequestId(""),  # nobody's: no drafter hears of it
            sampling=SamplingParams(temperature=0.0),
            num_prompt_tokens=len(self.hit.token_ids),
            token_ids=self.hit.token_ids,
            capacity=self.capacity,
            adapter=self.hit.adapter,
        )
        row = StepRow(slot=self.slot, start=first, capacity=self.capacity, token_ids=tokens, is_sampled=False)
        return Step(
            epoch=epoch,
            step_id=step_id,
            starts=[start] if first == 0 else [],
            decodes=[],
            prefills=[row],
            checks=self._comparison(prefix) if self.is_done else [],
        )

    def _comparison(self, prefix: PrefixCache) -> list[BlockStore]:
        """Those of the blocks that are still in the pool."""
        held = [(i, h, e.block_id) for i, h in enumerate(self.hit.hashes) if (e := prefix.index.get(h)) and e.is_ready]
        if not held:
            return []
        prefix.num_checked = len(held)
        return [
            BlockStore(
                slot=self.slot,
                indices=[i for i, _, _ in held],
                block_ids=[block_id for _, _, block_id in held if block_id is not None],
                hashes=[h for _, h, _ in held],
                has_window=[True] * len(held),
            )
        ]
