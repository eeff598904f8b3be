"""What the prefix cache does for sequences: how much of one is cached, who computes what others want, what to keep.

A sequence's blocks go into the device pool as its prefill computes them, and those of its output when it gives up its
slot. A sequence whose next block is being computed by another one waits for it; one whose blocks are archived waits
until they are loaded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from scheduler.prefix.counts import PrefixCounts
from scheduler.prefix.hashing import chain_seed, extend_chain
from scheduler.prefix.index import Entry, PrefixIndex
from scheduler.prefix.pace import ArchivePace
from scheduler.prefix.sharing import Sharing
from scheduler.sequence import Sequence
from shared.messages import (
    ArchivedBlock,
    BlocksArchived,
    BlocksLoaded,
    BlockStore,
    LoadBlocks,
    PrefixCacheInfo,
)

STATE_EVERY = 512  # tokens of a prompt between two kept recurrent states; its end has one too
OUTPUT_STATE_EVERY = 128  # tokens of output between two


@dataclass
class Load:
    """Blocks on their way from the archive: all entries are pinned until they have come."""

    sequence: Sequence
    pinned: list[Entry]
    loading: list[Entry]
    states: dict[int, int]  # position in `loading` -> state id


@dataclass(frozen=True)
class Hit:
    """The first `num_blocks` blocks of a sequence can be restored."""

    entries: list[Entry]
    reason: str | None  # why it is not longer, where more blocks are known


@dataclass(frozen=True)
class ToCheck:
    """A hit to compute again: tokens 0 .. of a sequence and the hashes of the blocks that hold them."""

    token_ids: list[int]
    hashes: list[bytes]
    adapter: str


class PrefixCache:
    """Args:
    info: of the target.
    fingerprint: of its weights; blocks of another model are never met.
    adapters: fingerprints of its LoRA adapters, likewise.
    counts: outlives this object.
    check_rate: share of hits to be computed again.
    token_s: seconds that a prompt's token takes; 0: not known yet.
    """

    def __init__(
        self,
        info: PrefixCacheInfo,
        fingerprint: str,
        counts: PrefixCounts,
        check_rate: float = 0.0,
        seed: int = 0,
        adapters: Mapping[str, str] = MappingProxyType({}),
        token_s: float = 0.0,
    ) -> None:
        self.info = info
        self.counts = counts
        self.index = PrefixIndex(info.num_blocks, info.num_states)
        self.sharing = Sharing(self.index, info.block_size) if info.is_shared else None
        self.pace = ArchivePace(token_s, info.block_bytes)
        self.to_load: list[LoadBlocks] = []  # to be sent by the owner, epoch not yet set
        self.to_check: list[ToCheck] = []
        self.num_checked = 0  # blocks of the comparison that is on its way
        self.num_untold = info.num_archived  # blocks of the archive that the target is about to tell of
        self._fingerprint = fingerprint
        self._adapters = adapters
        self._seeds: dict[str, bytes] = {}
        self._computing: dict[bytes, Sequence] = {}  # blocks that a running prefill will have
        self._loads: dict[int, Load] = {}
        self._num_loads = 0
        self._restored: list[Entry] = []  # by the step being planned: pinned, since nothing may overwrite them before
        self._stored: list[Entry] = []  # by the step being planned: the next one can restore them
        self._check_rate = check_rate
        self._random = random.Random(seed)

    # ------------------------------------------------ before a sequence's first row

    def share(self, sequence: Sequence) -> int:
        """Hold the cached blocks that a sequence will start from; the positions they save its slot."""
        if self.sharing is None:
            return 0
        limit = self._restorable(sequence)
        chain = self.index.chain(self._hashes(sequence, limit), limit)
        self.sharing.hold(sequence, self._usable(chain[: _num_ready(chain)]).entries)
        return self.sharing.num_tokens(sequence)

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether the sequence's start is worth putting off.

        Its next block is being computed or loaded, or is perhaps in the archive.
        """
        if sequence.is_started:
            return False
        if sequence.load_id is not None:
            return True
        limit = self._restorable(sequence)
        if limit and self.num_untold:
            return True
        chain = self.index.chain(self._hashes(sequence, limit), limit)
        num_ready = _num_ready(chain)
        if num_ready < len(chain):
            if chain[num_ready].is_awaited:
                return True
            if not sequence.was_loaded and self._start_load(sequence, chain):
                return True
        return num_ready < limit and sequence.block_hashes[num_ready] in self._computing

    def start(self, sequence: Sequence) -> None:
        """Count what is cached as computed; `sequence.restore` says what the slot has to be given."""
        limit = self._restorable(sequence)
        hashes = self._hashes(sequence, limit)
        chain = self.index.chain(hashes, limit)
        hit = self._usable(chain[: _num_ready(chain)])
        n = len(hit.entries)
        if sequence.incarnation == 0:
            self.counts.query_tokens += len(sequence.token_ids)
            self.counts.hit_tokens += n * self.info.block_size
            num_loaded = sum(entry.is_unused for entry in hit.entries)
            self.counts.hits_by_tier["archive"] += num_loaded * self.info.block_size
            self.counts.hits_by_tier["device"] += (n - num_loaded) * self.info.block_size
            sequence.num_cached_tokens = min(n * self.info.block_size, sequence.num_prompt_tokens)
        if hit.reason is not None:
            self.counts.misses[hit.reason] += 1
        elif n == 0 and limit > 0:
            self.counts.misses["unknown"] += 1
        for entry in hit.entries:
            entry.is_unused = False
        sequence.num_kept_blocks = n
        for block_hash in hashes[n:limit]:
            self._computing.setdefault(block_hash, sequence)
        if n == 0:
            return
        self.index.touch(hashes[:n])
        self.index.pin(hit.entries)
        if self.sharing is not None:
            self.sharing.hold(sequence, hit.entries)
        self._restored += hit.entries
        sequence.num_scheduled = n * self.info.block_size
        sequence.restore = [e.block_id for e in hit.entries if e.block_id is not None]
        sequence.restore_state = hit.entries[-1].state_id if self.info.is_recurrent else None
        # A media segment would need its encoder again; one check at a time is enough.
        is_chosen = self.info.is_checkable and self._random.random() < self._check_rate
        if is_chosen and not self.to_check and not sequence.marks:
            tokens = sequence.token_ids[: sequence.num_scheduled]
            self.to_check.append(ToCheck(tokens, hashes[:n], sequence.submit.adapter))

    def _usable(self, chain: list[Entry]) -> Hit:
        """The longest part of a chain of resident blocks that a slot can be restored from."""
        n, reason = len(chain), None
        if self.info.is_recurrent:
            while n and chain[n - 1].state_id is None:
                n -= 1
            reason = "no_state" if n < len(chain) else None
        elif self.info.ring_tokens:
            n = self._with_window(chain)
            reason = "no_window" if n < len(chain) else None
        return Hit(chain[:n], reason)

    def _with_window(self, chain: list[Entry]) -> int:
        """The longest part whose last `window` positions have their sliding rows."""
        needed = -(-self.info.window // self.info.block_size)
        best = run = 0
        for i, entry in enumerate(chain, start=1):
            run = run + 1 if entry.has_window else 0
            if run >= min(needed, i):
                best = i
        return best

    def _limit(self, sequence: Sequence) -> int:
        """Blocks before the last token: at least that one is left to compute."""
        return (len(sequence.token_ids) - 1) // self.info.block_size

    def _restorable(self, sequence: Sequence) -> int:
        """Blocks that may be restored: none where the hidden rows of all positions are wanted."""
        return 0 if sequence.submit.pooling == "mean" else self._limit(sequence)

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        submit = sequence.submit
        tenant = f"{submit.tenant}\0{submit.cache_salt}"
        if submit.adapter:  # a target that lacks it fails the sequence
            tenant += f"\0{self._adapters.get(submit.adapter, submit.adapter)}"
        if tenant not in self._seeds:
            if len(self._seeds) >= 4096:  # made anew when wanted again
                self._seeds.clear()
            self._seeds[tenant] = chain_seed(self._fingerprint, tenant, self.info.block_size)
        seed, size = self._seeds[tenant], self.info.block_size
        extend_chain(sequence.block_hashes, seed, sequence.token_ids, num_blocks, size, sequence.marks)
        return sequence.block_hashes

    # ------------------------------------------------ while it prefills

    def chunk_end(self, sequence: Sequence, end: int) -> int:
        """Where a prefill chunk that might go to `end` has to stop, so that a recurrent state can be kept there."""
        if not self.info.is_recurrent:
            return end
        first = sequence.num_scheduled
        last_border = self._limit(sequence) * self.info.block_size
        next_kept = (first // STATE_EVERY + 1) * STATE_EVERY
        for border in (next_kept, last_border):
            if first < border < end:
                end = border
        return end

    def state_for(self, sequence: Sequence, end: int) -> int | None:
        """A state id if the recurrent state after position end-1 is to be kept: the row that ends there says so."""
        if not self.info.is_recurrent or end % self.info.block_size:
            return None
        is_prompt_end = end // self.info.block_size == self._limit(sequence)
        interval = OUTPUT_STATE_EVERY if end > sequence.num_prompt_tokens else STATE_EVERY
        if end % interval and not is_prompt_end:
            return None
        # An older state of this sequence is overwritten.
        state_id = self.index.lend_state() if sequence.state is None else sequence.state[0]
        sequence.state = None if state_id is None else (state_id, end)
        return state_id

    def num_drafts_to_border(self, sequence: Sequence) -> int | None:
        """Most drafts whose row does not go beyond a position where the recurrent state is kept; None: any number."""
        if not self.info.is_recurrent:
            return None
        return -(sequence.num_scheduled + 1) % OUTPUT_STATE_EVERY

    def forget_state(self, sequence: Sequence) -> None:
        """Drafts were rejected or the row failed: what was kept is not the state at that place."""
        if sequence.state is not None:
            self.index.return_state(sequence.state[0])
            sequence.state = None

    def end_plan(self) -> None:
        """The step is complete: it restores first and stores last, so what it stores can be restored from now on."""
        self.index.unpin(self._restored)
        for entry in self._stored:
            entry.is_awaited = False
        self._restored, self._stored = [], []

    def store_prefilled(self, sequence: Sequence) -> BlockStore | None:
        """What the prefill row just planned completes."""
        store = self._store(sequence, sequence.num_scheduled)
        if sequence.num_remaining <= 0:
            self._stop_computing(sequence)
            self.index.touch(sequence.block_hashes[: sequence.num_kept_blocks])
        return store

    def keep(self, sequence: Sequence) -> BlockStore | None:
        """The sequence gives up its slot: its output's blocks are worth keeping."""
        self._stop_computing(sequence)
        if not sequence.is_started:
            self._let_go(sequence)
            return None
        computed = min(sequence.num_scheduled, len(sequence.token_ids))
        num_stored = len(self._stored)
        store = self._store(sequence, computed)
        for entry in self._stored[num_stored:]:
            entry.is_awaited = False  # it is stored before the next step begins
        del self._stored[num_stored:]
        self.forget_state(sequence)
        self.index.touch(sequence.block_hashes[: sequence.num_kept_blocks])
        self._let_go(sequence)
        return store

    def drop(self, sequence: Sequence) -> None:
        """The sequence failed: what it computed is not to be trusted."""
        self._stop_computing(sequence)
        self.forget_state(sequence)
        for block_hash in sequence.stored_hashes:
            self.index.discard(block_hash)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if self.sharing is not None:
            self.sharing.release(sequence)

    def _intact_from(self, end: int) -> int:
        """First position whose sliding rows are still in the ring of a sequence that ends at `end`."""
        return max(0, end - self.info.ring_tokens) if self.info.ring_tokens else 0

    def _store(self, sequence: Sequence, num_tokens: int) -> BlockStore | None:
        """Put the blocks up to `num_tokens` that are not cached yet into the pool, as awaited ones."""
        size, intact_from = self.info.block_size, self._intact_from(num_tokens)
        end = min(num_tokens // size, self.info.num_blocks)
        hashes = self._hashes(sequence, end)
        indices: list[int] = []
        entries: list[Entry] = []
        states: dict[int, int] = {}
        for index in range(sequence.num_kept_blocks, end):
            block_hash = hashes[index]
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
            entry = self.index.get(block_hash)
            is_intact = index * size >= intact_from
            is_new = entry is None or entry.block_id is None
            if is_new:
                entry = self.index.insert(block_hash, is_intact)
                sequence.stored_hashes.append(block_hash)
            if entry is None:  # everything is pinned
                end = index
                break
            if is_new or (is_intact and not entry.has_window and not entry.is_awaited):
                entry.has_window = is_intact
                entry.is_awaited = True
                indices.append(index)
                entries.append(entry)
            is_stored = entries[-1:] == [entry]
            if self._give_state(sequence, entry, (index + 1) * size):
                if is_stored and entry.state_id is not None:
                    states[len(entries) - 1] = entry.state_id
                elif not entry.is_awaited:
                    entry.is_awaited = True
                    self._stored.append(entry)
        sequence.num_kept_blocks = max(sequence.num_kept_blocks, end)
        if not entries:
            return None
        if self.sharing is not None:
            self.sharing.hold(sequence, entries)
        self._stored += entries
        assert sequence.slot is not None, "only a sequence with a slot has blocks to store"
        return BlockStore(
            slot=sequence.slot,
            indices=indices,
            block_ids=[e.block_id for e in entries if e.block_id is not None],
            hashes=[e.block_hash for e in entries],
            has_window=[e.has_window for e in entries],
            states=states,
        )

    def _give_state(self, sequence: Sequence, entry: Entry, end: int) -> bool:
        """Attach the recurrent state that the sequence kept at `end` to the block that ends there."""
        if sequence.state is None or sequence.state[1] != end:
            return False
        if entry.state_id is not None:
            self.forget_state(sequence)
            return False
        self.index.attach_state(entry, sequence.state[0])
        sequence.state = None
        return True

    def _stop_computing(self, sequence: Sequence) -> None:
        for block_hash in sequence.block_hashes[sequence.num_kept_blocks :]:
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]

    def checked(self, differing: list[bytes]) -> None:
        """The target compared `num_checked` blocks with a new computation."""
        self.counts.checks["different"] += len(differing)
        self.counts.checks["equal"] += self.num_checked - len(differing)
        self.num_checked = 0
        for block_hash in differing:
            self.index.discard(block_hash)

    # ------------------------------------------------ archive

    def _start_load(self, sequence: Sequence, chain: list[Entry]) -> bool:
        """Have the archived blocks of a chain brought to the device, if a slot can be restored from them then."""
        sequence.was_loaded = True
        chain = self._up_to_a_state(chain)
        absent = [e for e in chain if e.block_id is None]
        if not absent or len(chain) > self.info.num_blocks or any(e.is_awaited for e in chain):
            return False
        num_worth = self.pace.num_worth(len(absent), (len(chain) - _num_ready(chain)) * self.info.block_size)
        if num_worth < len(absent):
            self.counts.misses["slow_archive"] += 1
            chain = self._cut(chain, num_worth)
            absent = [e for e in chain if e.block_id is None]
            if not absent:
                return False
        self.index.pin(chain)
        loading = [e for e in absent if self.index.insert(e.block_hash, e.archived_window) is not None]
        if len(loading) < len(absent):  # everything else is pinned: better to compute
            self.index.unpin(chain)
            for entry in loading:
                self.index.evict(entry)
            return False
        for entry in loading:
            entry.is_awaited = True
        states: dict[int, int] = {}
        if self.info.is_recurrent and chain[-1].state_id is None and (state_id := self.index.lend_state()) is not None:
            states[len(loading) - 1] = state_id
        self._num_loads += 1
        sequence.load_id = self._num_loads
        self._loads[self._num_loads] = Load(sequence, chain, loading, states)
        self.to_load.append(
            LoadBlocks(
                epoch=0,
                load_id=self._num_loads,
                hashes=[e.block_hash for e in loading],
                block_ids=[e.block_id for e in loading if e.block_id is not None],
                states=states,
            )
        )
        return True

    def _up_to_a_state(self, chain: list[Entry]) -> list[Entry]:
        """What a slot can be restored from: of a recurrent model up to the last state."""
        n = len(chain)
        while self.info.is_recurrent and n and not _has_state(chain[n - 1]):
            n -= 1
        return chain[:n]

    def _cut(self, chain: list[Entry], num_absent: int) -> list[Entry]:
        """A chain's first blocks, of which so many have to be loaded; of a recurrent model at least up to its first
        state behind them."""
        if num_absent == 0:
            return []
        end = [i for i, e in enumerate(chain) if e.block_id is None][num_absent - 1] + 1
        while self.info.is_recurrent and not _has_state(chain[end - 1]):
            end += 1  # the whole chain ends with one
        return chain[:end]

    def loaded(self, message: BlocksLoaded) -> bool:
        """Blocks have come, or turned out to be gone. False: nobody waited for them."""
        load = self._loads.pop(message.load_id, None)
        if load is None or len(message.is_loaded) != len(load.loading):
            return False
        if load.sequence.load_id == message.load_id:
            load.sequence.load_id = None
        for i, (entry, is_loaded) in enumerate(zip(load.loading, message.is_loaded, strict=True)):
            entry.is_awaited, entry.is_unused = False, is_loaded
            state_id = load.states.get(i)
            if is_loaded and state_id is not None and entry.block_id is not None:
                self.index.attach_state(entry, state_id)
            elif state_id is not None:
                self.index.return_state(state_id)
            if not is_loaded:
                self.counts.misses["load_failed"] += 1
                self.index.discard(entry.block_hash)
        self.index.unpin(load.pinned)
        return True

    def archived(self, message: BlocksArchived) -> None:
        self.num_untold = max(0, self.num_untold - len(message.added))
        for block in message.added:
            self._archived(block)
        for block_hash in message.removed:
            self.index.unarchived(block_hash)
        for tier in message.blocks:
            self.counts.blocks[tier] = message.blocks[tier]
            self.counts.tier_bytes[tier] = message.tier_bytes.get(tier, 0)
        self.counts.archive_errors += message.num_errors

    def _archived(self, block: ArchivedBlock) -> None:
        self.index.archived(block.block_hash, block.has_window, block.has_state)

    # ------------------------------------------------ for the API

    def clear(self) -> int:
        """Forget every block; how many the device tier held."""
        self.to_check = []
        return self.index.clear()

    def shrink(self) -> tuple[list[int], list[int]]:
        """Take all blocks that nobody reads at the moment out of the device pool.

        Returns:
            ids of the blocks that stay, and of the recurrent states that nobody has.
        """
        self.to_check = []
        self.index.evict_all()
        return self.index.resident_ids(), self.index.free_state_ids()

    def measure(self) -> None:
        """Bring the figures of the device tier up to date."""
        resident, info = self.index.num_resident, self.info
        self.counts.evictions += self.index.num_evicted
        self.index.num_evicted = 0
        self.counts.blocks["device"] = resident
        self.counts.tier_bytes["device"] = resident * info.block_bytes + self.index.num_states_used * info.state_bytes

    def check_integrity(self) -> None:
        self.index.check_integrity()
        assert all(s.slot is not None and s.is_started for s in self._computing.values()), "nobody computes this block"
        assert all(e.num_pins > 0 for load in self._loads.values() for e in load.pinned), (
            "a block may leave while loaded"
        )


def _has_state(entry: Entry) -> bool:
    """On the device or in the archive."""
    return entry.state_id is not None or entry.archived_state


def _num_ready(chain: list[Entry]) -> int:
    return next((i for i, e in enumerate(chain) if not e.is_ready), len(chain))
