"""Runs steps: forwards for decode and prefill rows, one head call, one sampling call, one wait.

No socket and no clock of the scheduler's here. `begin` builds a step's graph and hands it to the device without
waiting, `finish` waits and reads; calling `begin` for step n+1 before `finish` for step n keeps the device busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import msgspec
import numpy as np

from shared.errors import InvalidRequest
from shared.grammar import Compiler
from shared.messages import (
    BlockStore,
    EncodeRow,
    FeatureRows,
    RequestId,
    RowResult,
    SequenceStart,
    Step,
    StepResult,
    StepRow,
    TokenLogprob,
)
from workers.accept import count_accepted
from workers.adapters import Adapters
from workers.arrays import start_evaluating, to_list
from workers.cache.blocks import BlockPool
from workers.cache.store import CacheStore, RecurrentSnapshot
from workers.early_start import Starts
from workers.features import Bits, as_bits
from workers.kernels.base import MAX_VERIFY_WIDTH
from workers.media import SlotMedia
from workers.models.base import MediaModel
from workers.pooling import Pool
from workers.prefill_groups import prefill_groups
from workers.runner import ModelRunner
from workers.sampling import constraint
from workers.sampling.rejection import Proposal, proposals
from workers.sampling.sampler import Sampled, SampledRow, SlotSampling, sample

WIDTH_STEP = 64
CHECK_TOLERANCE = 0.02  # of a block's largest value; bfloat16 forwards of different shapes differ by about 0.008
MAX_REPLAY_WIDTH = 16  # widest row of a recurrent model with the accepted tokens it feeds again

AcceptRule = Callable[[Sequence[int], Sequence[int]], int]
"""(drafts (k,), the target's draws (k+1,)) -> how many drafts are accepted."""


@dataclass
class FusedRows:
    """The fused features' bits (N, H) of a forward's tokens; those of rows[i] begin at firsts[i]."""

    rows: list[StepRow]
    firsts: list[int]
    bits: mx.array


@dataclass
class PendingStep:
    """A step on its way: what to read and whose it is."""

    step: Step
    rows: list[StepRow]  # sampled rows, in the order of `spans`
    spans: list[tuple[int, int]]  # rows[i] owns sampled positions spans[i][0] .. spans[i][1]-1
    sampled_rows: list[SampledRow]
    sampled: Sampled | None
    pending: list[mx.array]  # what must be evaluated where nothing is sampled
    features: list[FusedRows]  # of each forward
    restored: list[tuple[FeatureRows, mx.array]]  # features of restored prefixes (n, H)
    request_ids: dict[int, RequestId]  # slot -> whose rows these are
    checks: list[tuple[BlockStore, mx.array]]  # what was compared with the prefix cache, and where it differs
    build_s: float
    vectors: list[tuple[int, mx.array]]  # slots whose prompt is whole, and its pooled row (H,)


class Engine:
    """Slots, their sampling states and the model.

    Args:
        model: the target.
        store: its caches.
        num_slots: slot ids are 0 .. num_slots-1.
        blocks: the prefix cache's device tier; None where it is switched off.
        starts: switches whether forwards are handed over in parts; None where they never are.
        adapters: the model's LoRA adapters; None: it has none.
    """

    def __init__(
        self,
        model: ModelRunner,
        store: CacheStore,
        num_slots: int,
        vocab_size: int,
        blocks: BlockPool | None = None,
        starts: Starts | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.blocks = blocks
        self.count_accepted: AcceptRule = count_accepted  # a bench puts a given acceptance rate here
        self.vocab_size = vocab_size
        self.grammars: Compiler | None = None  # None: the model has no tokenizer that grammars can be used with
        self.hidden_size = 0  # of its hidden rows, where they can be seen; known after the warm-up
        self.state_bytes = 0  # of one slot's recurrent states, known after the warm-up
        self.media = SlotMedia(model.model) if isinstance(model.model, MediaModel) else None
        self.adapters = adapters
        self._slots: dict[int, SlotSampling] = {}
        self._adapter_names: dict[int, str] = {}  # slot -> its sequence's adapter; "" for the base model
        self._request_ids: dict[int, RequestId] = {}
        self._snapshots: dict[int, RecurrentSnapshot] = {}
        self._replay: dict[int, list[int]] = {}  # recurrent: accepted tokens that the slot's state lacks
        self._rewinds: bool = self.store.is_recurrent and getattr(model.model, "rewinds", False)
        self._kept: dict[int, int] = {}  # where it is so: how many of a row's tokens stay, after a rejected draft
        self._failed: set[int] = set()  # slots whose keys and values may hold NaN
        self._features: list[FusedRows] = []
        self._restored: list[tuple[FeatureRows, mx.array]] = []
        self._unsent: dict[int, int] = {}  # slot -> first position whose features the drafter was not sent
        self._holds_features = False
        self._pools: dict[int, Pool] = {}  # slots whose hidden rows are wanted in place of tokens
        self._last_tokens = mx.zeros((num_slots,), mx.int32)
        self._num_slots = num_slots
        self._starts = starts
        self._num_begun = 0  # steps that are not finished
        self._unkept: list[BlockStore] = []  # of steps that were begun: see `keep_blocks`
        self.packs_rows = store.packs_rows and getattr(model.model, "packs_rows", False)  # docs/speculation.md

    def reset(self) -> None:
        """Forget every sequence and every cached prefix. No step that was begun is finished any more."""
        self._num_begun = 0
        self._unkept = []
        self.release(list(self._slots))
        if self.blocks is not None:
            self.blocks.reset()

    def release(self, slots: Sequence[int], stores: Sequence[BlockStore] = ()) -> None:
        """Free slots, after `stores` of theirs went to the prefix cache."""
        self._unkept += stores
        self.keep_blocks()
        for slot in slots:
            if self.media is not None:
                self.media.release(slot)
            if self._slots.pop(slot, None) is not None:
                self._snapshots.pop(slot, None)
                self._replay.pop(slot, None)
                self._pools.pop(slot, None)
                self._unsent.pop(slot, None)
                if slot in self.store.placement:
                    if slot in self._failed:
                        self.store.clear(slot)
                    self.store.release(slot)
                self._failed.discard(slot)

    def shrink(self, kept_blocks: Collection[int], free_states: Iterable[int]) -> None:
        """Memory is short: give back what no slot and no kept block needs. Steps that were begun keep their arrays."""
        self.keep_blocks()
        if self.blocks is not None:
            self.blocks.shrink(kept_blocks, free_states)
        self.store.trim()
        mx.clear_cache()

    # ------------------------------------------------ begin

    def begin(self, step: Step) -> PendingStep:
        """Queue a step on the device. Rows' caches are written in the order of the steps."""
        started = time.perf_counter()
        self.keep_blocks()
        if self._starts is not None:
            self._starts.is_on = not self._num_begun
        self._num_begun += 1
        self._restored = []
        self._holds_features = step.holds_features and self.blocks is not None  # else nothing keeps them
        for start in step.starts:
            self._bind(start)
            self._restore(start)
        encoded = [self._encode(row) for row in step.encodes]
        for row in (*step.decodes, *step.prefills):
            assert row.slot in self._slots, f"step {step.step_id} uses slot {row.slot}, which holds no sequence"
            self.store.ensure(row.slot, row.capacity)
        rows: list[StepRow] = []
        spans: list[tuple[int, int]] = []
        sampled_rows: list[SampledRow] = []
        parts: list[mx.array] = []
        self._features = []
        for group in self._groups(step):
            for row, part in self._forward(group):
                first = len(sampled_rows)
                sampled_rows += self._sampled_positions(row)
                rows.append(row)
                spans.append((first, len(sampled_rows)))
                parts.append(part)
        sampled = None
        if parts:
            hidden = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            self._add_masks(spans, sampled_rows, hidden)
            sampled = sample(self.model.head(hidden), sampled_rows)
            self._remember(rows, spans, sampled)
        pending = [*encoded, *(sampled.arrays() if sampled else [])]
        pooled = [row for row in (*step.decodes, *step.prefills) if row.slot in self._pools]
        pending += [self._pools[row.slot].pending() for row in pooled]
        vectors = [(row.slot, self._pools[row.slot].vector()) for row in pooled if row.is_sampled]
        pending += [vector for _, vector in vectors]
        if any(not row.is_sampled for row in step.prefills) or self.store.is_recurrent:
            pending += self.store.pending()
        pending += [fused.bits for fused in self._features]
        pending += self.store.writes()
        start_evaluating(pending)
        self._unkept += step.stores
        checks = [(check, self._differing(check)) for check in step.checks]
        pending += [array for _, array in checks]
        ids = {row.slot: self._request_ids[row.slot] for row in (*step.decodes, *step.prefills)}
        elapsed = time.perf_counter() - started
        return PendingStep(
            step, rows, spans, sampled_rows, sampled, pending, self._features, self._restored, ids, checks, elapsed,
            vectors,
        )  # fmt: skip

    def _bind(self, start: SequenceStart) -> None:
        if start.slot in self._slots:
            self.release([start.slot])
        self._request_ids[start.slot] = start.request_id
        state = SlotSampling.start(start.sampling, self.vocab_size, start.token_ids, start.num_prompt_tokens)
        try:
            output = start.token_ids[start.num_prompt_tokens :]
            state.constraint = constraint.start(self.grammars, start.grammar, start.thinking, output)
        except InvalidRequest as error:  # the frontend checks grammars, so this is a model or a client of its own
            state.error = error.message
        is_known = not start.adapter or (self.adapters is not None and start.adapter in self.adapters.names)
        if not is_known:  # a target with other adapters took over
            state.error = f"the adapter {start.adapter!r} is not served any more"
        self._adapter_names[start.slot] = start.adapter if is_known else ""
        self._slots[start.slot] = state
        if start.pooling is not None:
            self._pools[start.slot] = Pool(start.pooling)
        if start.media:
            assert self.media is not None, "media for a model that takes none"
            self.media.bind(start.slot, start.num_prompt_tokens, start.media)

    def _encode(self, row: EncodeRow) -> mx.array:
        assert self.media is not None, "media for a model that takes none"
        return self.media.encode(row.slot, row.index)

    def _restore(self, start: SequenceStart) -> None:
        """Give a new sequence's slot what the prefix cache holds of it."""
        if start.restore:
            assert self.blocks is not None, "blocks to restore and no prefix cache"
            self.store.ensure(start.slot, start.capacity)
            self.blocks.restore(start.slot, start.restore, start.restore_state)
            if self.model.captures:
                self._unsent[start.slot] = 0
                if not self._holds_features:
                    self._send_kept_features(start.slot, len(start.restore) * self.blocks.block_size)

    def _send_kept_features(self, slot: int, end: int) -> None:
        """Those of a slot's positions below `end` that the drafter was not sent, from beside its keys and values."""
        first = self._unsent.pop(slot, end)
        features = self.store.read_features(slot, end) if first < end else None
        if features is not None:
            bits = as_bits(features[first:])
            start_evaluating([bits])  # before the slot is written to: then that happens in place
            rows = FeatureRows(request_id=self._request_ids[slot], start=first, num_rows=end - first)
            self._restored.append((rows, bits))

    def keep_blocks(self) -> None:
        """Copy the blocks that the steps begun so far completed into the prefix cache, behind all that is queued.

        Call it once their results are out, which need not wait for it. The next step or release does it at the latest,
        before anything else touches the slots.
        """
        if self._unkept:
            assert self.blocks is not None, "blocks to store and no prefix cache"
            for stored in self._unkept:
                self.blocks.keep(stored)
            self._unkept = []
            start_evaluating(self.blocks.pending())

    def _differing(self, check: BlockStore) -> mx.array:
        assert self.blocks is not None, "blocks to check and no prefix cache"
        differing = self.blocks.differing(check, CHECK_TOLERANCE)
        start_evaluating([differing])
        return differing

    def _groups(self, step: Step) -> Iterator[list[StepRow]]:
        """Rows that share a forward: those that can be packed; of the others decode rows (of one width where states are
        recurrent), and prefills of one kind.
        """
        decodes, prefills = step.decodes, step.prefills
        if self.packs_rows:
            packed = [row for row in (*decodes, *prefills) if not self._has_media(row)]
            if packed:
                yield packed
            decodes, prefills = ([row for row in rows if self._has_media(row)] for rows in (decodes, prefills))
        if self._needs_one_width:
            yield from self._recurrent_groups(decodes)
        elif decodes:
            yield decodes
        yield from prefill_groups(prefills, self._prefill_kind, lambda row: self._padded(_width(row)))

    @property
    def _needs_one_width(self) -> bool:
        """Recurrent layers that know no padding, or a CPU, where padding costs."""
        return self.store.is_recurrent and (self.store.is_exact or not self._rewinds)

    def _prefill_kind(self, row: StepRow) -> tuple[int, ...] | None:
        """Prefills that begin at one position see the same keys behind each other: causal attention without a mask.

        Those that go on from somewhere share a forward wherever they begin, where kernels attend in tiles.
        """
        if self.store.is_exact or self._needs_one_width or self._has_media(row):
            return None
        if row.start and self.store.takes_any_starts:
            return (self._padded(_width(row)),)
        return row.start, self._padded(_width(row)), self.store.placement.where(row.slot)[0]

    def _has_media(self, row: StepRow) -> bool:
        return self.media is not None and row.slot in self.media

    def _recurrent_groups(self, decodes: list[StepRow]) -> Iterator[list[StepRow]]:
        """Rows by width, so that nothing is padded: a padding token would go into a recurrent state.

        Without trails the accepted tokens are fed again after a partly rejected draft: at the head of the slot's next
        row while that is short, otherwise in a forward of their own.
        """
        by_width: dict[int, list[StepRow]] = {}
        for row in decodes:
            replay = self._replay.pop(row.slot, None)
            if replay is not None:
                assert row.token_ids is not None, "a row after a rejection brings its tokens"
                start = row.start - len(replay)
                if len(replay) + _width(row) > MAX_REPLAY_WIDTH:
                    yield [
                        StepRow(slot=row.slot, start=start, capacity=row.capacity, token_ids=replay, is_sampled=False)
                    ]
                else:
                    row = msgspec.structs.replace(row, start=start, token_ids=[*replay, *row.token_ids])
            if row.num_drafts and not self._rewinds:
                self._snapshots[row.slot] = self.store.snapshot(row.slot)
            by_width.setdefault(_width(row), []).append(row)
        yield from by_width.values()

    def _forward(self, group: list[StepRow]) -> list[tuple[StepRow, mx.array]]:
        """Run one forward; for each sampled row the hidden rows (n, H) whose logits are wanted."""
        slots, starts, widths = [r.slot for r in group], [r.start for r in group], [_width(r) for r in group]
        if self.packs_rows and len(set(widths)) > 1 and not self._has_media(group[0]):  # groups are all with or without
            batch = self.store.open_packed(slots, starts, widths)
            ordered = [group[i] for i in batch.order]
            inputs = self._packed_inputs(ordered)
            self._select_adapters(ordered, [_width(row) for row in ordered])
        else:
            width = self._padded(max(widths))
            spans = self.media.spans(group) if self.media is not None else None
            batch = self.store.open(slots, starts, width, widths, spans)
            for view in batch.recurrent:
                view.has_drafts = self._rewinds and any(row.num_drafts for row in group)
            ordered = [group[i] for i in batch.order]
            inputs = self._inputs(ordered, width)
            self._select_adapters(ordered)
        media = self.media.forward(ordered, inputs) if self.media is not None else None
        hidden = self.model.hidden_rows(inputs, batch.layers, self._wanted(ordered, batch.firsts), media)
        features = self.model.features()
        if features is not None:
            if self._holds_features:
                for row in group:
                    self._unsent.setdefault(row.slot, row.start)
            else:
                for row in group:
                    self._send_kept_features(row.slot, row.start)
                # Read on the host as they are: an operation built after the step would wait behind the step after it.
                bits = as_bits(features.reshape(-1, features.shape[-1]))
                self._features.append(FusedRows(ordered, batch.firsts, bits))
            if self.blocks is not None:
                self.store.write_features(batch, features)
        batch.close()
        for row, first in zip(ordered, batch.firsts, strict=True):
            if (pool := self._pools.get(row.slot)) is not None:
                pool.add(self.model.final_rows()[first : first + _width(row)])
            if row.keep_state is not None:
                assert self.blocks is not None, "a state to keep and no prefix cache"
                self.blocks.keep_state(row.slot, row.keep_state)
        result, at = [], 0
        for row in ordered:
            if self._is_drawn(row):
                n = row.num_drafts + 1
                result.append((row, hidden[at : at + n]))
                at += n
        return result

    def _select_adapters(self, rows: list[StepRow], widths: Sequence[int] | None = None) -> None:
        """Before a forward is built. `widths` where its rows are packed."""
        if self.adapters is not None:
            self.adapters.select([self._adapter_names[row.slot] for row in rows], widths)

    def _padded(self, width: int) -> int:
        """Steps on a GPU come in few widths, since each new shape is compiled; padding goes into the slack."""
        if self.store.is_exact or self._needs_one_width:
            return width
        if width <= MAX_VERIFY_WIDTH:
            return 1 << (width - 1).bit_length()
        return min(-(-width // WIDTH_STEP) * WIDTH_STEP, self.store.max_width)

    def _inputs(self, rows: list[StepRow], width: int) -> mx.array:
        """Token ids (B, width): from the message, or the slot's last sampled token, which only the device knows."""
        on_device = [row.token_ids is None for row in rows]
        last = self._last_tokens[mx.array([row.slot for row in rows])][:, None] if any(on_device) else None
        if last is not None and width == 1 and all(on_device):
            return last
        known = mx.array([[*(row.token_ids or [0]), *[0] * (width - _width(row))] for row in rows], dtype=mx.int32)
        if last is None:
            return known
        return mx.where(mx.array(on_device)[:, None], mx.broadcast_to(last, known.shape), known)

    def _packed_inputs(self, rows: list[StepRow]) -> mx.array:
        """The rows' token ids one behind another, (1, T)."""
        known = mx.array([token for row in rows for token in row.token_ids or [0]], dtype=mx.int32)
        if all(row.token_ids is not None for row in rows):
            return known[None]
        tokens = [(row.slot, row.token_ids is None) for row in rows for _ in range(_width(row))]
        slots, on_device = (mx.array(column) for column in zip(*tokens, strict=True))
        return mx.where(on_device, self._last_tokens[slots], known)[None]

    def _is_drawn(self, row: StepRow) -> bool:
        """Whether a token is drawn from the row: one that is pooled only says that its prompt is whole."""
        return row.is_sampled and row.slot not in self._pools

    def _wanted(self, rows: list[StepRow], firsts: list[int]) -> list[tuple[int, int]]:
        """(first, end) of the forward's tokens whose logits are needed."""
        ends = [first + _width(row) for row, first in zip(rows, firsts, strict=True)]
        return [(end - row.num_drafts - 1, end) for row, end in zip(rows, ends, strict=True) if self._is_drawn(row)]

    def _sampled_positions(self, row: StepRow) -> list[SampledRow]:
        state, tokens = self._slots[row.slot], row.token_ids or []
        first = row.start + _width(row) - row.num_drafts
        drafts = tokens[len(tokens) - row.num_drafts :] if row.num_drafts else []
        tried: list[Proposal | None] = [None] * (row.num_drafts + 1)
        if row.draft_distribution is not None and state.is_rejection_sampled:
            tried[:-1] = proposals(drafts, row.draft_distribution)
        return [SampledRow(state, first + i, drafts[:i], tried[i]) for i in range(row.num_drafts + 1)]

    @staticmethod
    def _add_masks(spans: Sequence[tuple[int, int]], sampled_rows: list[SampledRow], hidden: mx.array) -> None:
        """Masks of rows with a constraint, computed on the host while the device runs the forward."""
        constrained = [span for span in spans if sampled_rows[span[0]].state.constraint is not None]
        if not constrained:
            return
        start_evaluating([hidden])
        for first, end in constrained:
            held = sampled_rows[first].state.constraint
            assert held is not None, "chosen for it"
            for i, mask in zip(range(first, end), held.masks(sampled_rows[end - 1].drafts), strict=True):
                sampled_rows[i].mask = mask

    def _remember(self, rows: list[StepRow], spans: list[tuple[int, int]], sampled: Sampled) -> None:
        """Rows without drafts: their token feeds the next step without passing the host."""
        plain = [(row.slot, span[0]) for row, span in zip(rows, spans, strict=True) if row.num_drafts == 0]
        if not plain:
            return
        slots, indices = (list(column) for column in zip(*plain, strict=True))
        tokens = sampled.tokens if len(plain) == sampled.tokens.shape[0] else sampled.tokens[mx.array(indices)]
        self._last_tokens[mx.array(slots)] = tokens
        for slot, index in plain:
            if self._slots[slot].has_penalties:
                self._slots[slot].note(sampled.tokens[index : index + 1])

    # ------------------------------------------------ finish

    def finish(self, pending: PendingStep) -> StepResult:
        """Wait for a step and read it: the one synchronisation with the device."""
        started = time.perf_counter()
        self._num_begun = max(0, self._num_begun - 1)
        mx.eval(pending.pending)
        waited = time.perf_counter()
        results: list[RowResult] = []
        if pending.sampled is not None:
            tokens, is_finite = to_list(pending.sampled.tokens), to_list(pending.sampled.is_finite)
            logprobs = pending.sampled.read_logprobs(pending.sampled_rows)
            for row, (first, end) in zip(pending.rows, pending.spans, strict=True):
                state = pending.sampled_rows[first].state
                results.append(self._row_result(row, state, tokens[first:end], is_finite[first:end], first, logprobs))
        results += [self._pooled_result(slot, vector) for slot, vector in pending.vectors]
        if self._kept:
            self.store.rewind(self._kept)
            self._kept = {}
            start_evaluating([a for layer in self.store.recurrent_layers for a in layer.pending()])
        read = time.perf_counter()
        return StepResult(
            epoch=pending.step.epoch,
            step_id=pending.step.step_id,
            rows=results,
            phases={"build": pending.build_s, "device": waited - started, "read": read - waited},
            differing=[
                block_hash
                for check, differs in pending.checks
                for block_hash, is_different in zip(check.hashes, to_list(differs), strict=True)
                if is_different
            ],
        )

    def feature_rows(self, pending: PendingStep, result: StepResult) -> tuple[list[FeatureRows], Bits] | None:
        """The fused features of a finished step's committed and restored positions: whose they are, and (n, H) rows."""
        num_tokens = {row.slot: len(row.token_ids) for row in result.rows}
        described = [rows for rows, _ in pending.restored]
        parts = [np.array(array) for _, array in pending.restored]
        for fused in pending.features:
            array = np.array(fused.bits)
            for row, first in zip(fused.rows, fused.firsts, strict=True):
                n = _width(row)
                if row.num_drafts:  # anchor and accepted drafts
                    n += num_tokens.get(row.slot, 0) - row.num_drafts - 1
                if n > 0 and pending.request_ids[row.slot]:
                    described.append(FeatureRows(request_id=pending.request_ids[row.slot], start=row.start, num_rows=n))
                    parts.append(array[first : first + n])
        return (described, np.concatenate(parts)) if parts else None

    def _pooled_result(self, slot: int, vector: mx.array) -> RowResult:
        values = np.array(vector, dtype="<f4")
        if not np.isfinite(values).all():
            self._failed.add(slot)
            return RowResult(slot=slot, token_ids=[], error="the model put out NaN or infinite hidden rows")
        return RowResult(slot=slot, token_ids=[], embedding=values.tobytes())

    def _row_result(
        self,
        row: StepRow,
        state: SlotSampling,
        tokens: list[int],
        is_finite: list[bool],
        first: int,
        logprobs: dict[int, TokenLogprob],
    ) -> RowResult:
        drafts = (row.token_ids or [])[-row.num_drafts :] if row.num_drafts else []
        num_accepted = self.count_accepted(drafts, tokens)
        n = num_accepted + 1
        if not all(is_finite[:n]):
            self._failed.add(row.slot)
            return RowResult(slot=row.slot, token_ids=[], error="the model put out NaN or infinite logits")
        kept = tokens[:n]
        if state.constraint is not None:
            state.constraint.advance(kept)
        error = state.error or (state.constraint.error if state.constraint is not None else None)
        if error is not None:
            return RowResult(slot=row.slot, token_ids=[], error=f"grammar: {error}")
        if row.num_drafts and row.slot in self._slots:
            self._slots[row.slot].note(kept)
            if self._rewinds and num_accepted < row.num_drafts:
                self._kept[row.slot] = _width(row) - row.num_drafts + num_accepted
            snapshot = self._snapshots.pop(row.slot, None)
            if snapshot is not None and num_accepted < row.num_drafts:
                self.store.restore(row.slot, snapshot)
                inputs = row.token_ids or []
                self._replay[row.slot] = inputs[: len(inputs) - row.num_drafts + num_accepted]
        wanted = [logprobs[first + i] for i in range(n)] if first in logprobs else None
        return RowResult(slot=row.slot, token_ids=kept, logprobs=wanted)


def _width(row: StepRow) -> int:
    return 1 if row.token_ids is None else len(row.token_ids)
