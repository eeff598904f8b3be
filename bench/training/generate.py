"""Documents from the target itself: prompts and answers, thousands of sequences in fixed slots.

A slot's life (prefix of the chat template, user turn written by the target, the template's turn, answer) is decided on
the device; a slot that ends begins anew in the next step. The host reads a log of tokens every so many steps, while the
next ones run, and cuts it into documents.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from bench.training.documents import HELD_OUT, TRAIN, Documents, before_loop, is_looped
from bench.training.prompts import Openings
from bench.training.sampler import sample
from bench.training.target import Target
from workers.arrays import start_evaluating
from workers.kernels.base import PagedAttention, Variant
from workers.kernels.cuda import supports
from workers.kernels.pages import Pages, Pool
from workers.kernels.reference import ReferenceAttention
from workers.kernels.select import machine_kernel
from workers.models.rope import Rotate, Rotation, rotated

PREFIX, USER, TURN, ANSWER = range(4)  # where in its life a slot is
# A log entry: a token fed, and in the high bits the phase and what happened after it.
PHASE_SHIFT, ENDED, BAD = 20, 1 << 25, 1 << 26
TOKEN_MASK = (1 << PHASE_SHIFT) - 1

MIN_BEFORE_LOOP = 32  # tokens of a document that are worth keeping

ANSWER_TEMPERATURES = (0.0, 0.0, 0.0, 0.0, 0.0, 0.7, 0.8, 0.8, 0.9, 1.0)  # half greedy
USER_TEMPERATURES = (1.0, 1.0, 1.0, 0.8, 0.8)


@dataclass(frozen=True)
class GenerateOptions:
    num_slots: int = 2048
    capacity: int = 576  # positions of a slot
    max_answer: int = 448
    min_user: int = 3
    max_user: int = 96
    min_p: float = 0.01
    steps_per_read: int = 32
    held_out_share: float = 0.015
    seed: int = 0


class Slots(NamedTuple):
    """The state of every slot, each (B,)."""

    token: mx.array  # int32, to be fed
    position: mx.array  # int32, where
    phase: mx.array  # int32
    row: mx.array  # int32, which prefix
    num_tokens: mx.array  # int32, tokens of this phase so far, the one to be fed included
    user_temperature: mx.array
    answer_temperature: mx.array


class SlotCache:
    """One layer's keys and values of all slots; `LayerCache` for one token a row."""

    def __init__(self, attention: PagedAttention, pool: Pool, table: mx.array, capacity: int) -> None:
        self._attention = attention
        self._pool = pool
        self._table = table
        self._longest = (capacity - 1,)
        self.offset: mx.array = mx.zeros((table.shape[0],), dtype=mx.int32)

    def attend(
        self, q: mx.array, k: mx.array | None, v: mx.array | None, scale: float, window: int | None = None,
        sinks: mx.array | None = None, rotation: Rotate | None = None, sees_spans: bool = False,
    ) -> mx.array:  # fmt: skip
        assert k is not None and v is not None, "every layer has keys of its own"
        is_fused = isinstance(rotation, Rotation) and rotation.is_plain
        if rotation is not None and not is_fused:
            q, k = rotated(q, rotation), rotated(k, rotation)
        fused = rotation if is_fused and isinstance(rotation, Rotation) else None
        pages = Pages(self._table, self.offset, self._longest)
        variant = Variant(scale, window, None, sinks, fused)
        return self._attention.attend(q, k, v, self._pool, pages, variant)


@dataclass
class Generator:
    """Endless documents; `steps` of it are deterministic for a seed and a number of slots."""

    target: Target
    openings: Openings
    options: GenerateOptions
    num_documents: int = field(default=0, init=False)
    num_bad_prompts: int = field(default=0, init=False)
    num_looped: int = field(default=0, init=False)
    num_answer_tokens: int = field(default=0, init=False)
    num_slot_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        model, o = self.target.model, self.options
        longest = max(map(len, self.openings.prefixes))
        if longest + o.max_user + len(self.openings.turn) + 2 > o.capacity:
            raise ValueError(f"{o.capacity} positions do not hold a prompt")
        if not model.is_cpu and hasattr(model, "join_attention_inputs") and machine_kernel() is not None:
            model.join_attention_inputs()
        shape, dtype = self.target.shape, self.target.dtype
        kernel = machine_kernel()
        if kernel is None or not supports(shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype.size, 1):
            kernel = ReferenceAttention()
        table = mx.arange(o.num_slots, dtype=mx.int32)[:, None]
        room = (o.num_slots, shape.num_kv_heads, o.capacity, shape.head_dim)
        self._caches = []
        for _ in range(shape.num_target_layers):
            keys, values = mx.zeros(room, dtype=dtype), mx.zeros(room, dtype=dtype)
            mx.eval(keys, values)
            self._caches.append(SlotCache(kernel, Pool(keys, values), table, o.capacity))
        prefixes = np.zeros((len(self.openings.prefixes), longest), dtype=np.int32)
        for i, prefix in enumerate(self.openings.prefixes):
            prefixes[i, : len(prefix)] = prefix
        special = np.zeros(shape.vocab_size, dtype=bool)
        special[self.openings.ends] = True
        special[list(range(min(2, shape.vocab_size)))] = True  # beginnings of text and of turns
        self._tables = Tables(
            mx.array(prefixes), mx.array([len(p) for p in self.openings.prefixes], dtype=mx.int32),
            mx.array(np.cumsum(self.openings.shares), dtype=mx.float32), mx.array(self.openings.turn, dtype=mx.int32),
            mx.array(special),
        )  # fmt: skip
        self._number = 0
        self._slots = fresh(o.num_slots, self._tables, self._key())
        self._open: list[list[np.ndarray]] = [[] for _ in range(o.num_slots)]  # tokens and facts of unfinished ones
        self._seen: set[bytes] = set()

    def _key(self) -> mx.array:
        self._number += 1
        key: mx.array = mx.random.key((self.options.seed << 32) + self._number)
        return key

    def step(self) -> tuple[mx.array, mx.array, mx.array]:
        """Queue one token of every slot: (log entries, sampled tokens, answer temperatures), each (B,). Lazy."""
        slots = self._slots
        for cache in self._caches:
            cache.offset = slots.position
        hidden = self.target.model.hidden(slots.token[:, None], self._caches)
        logits = self.target.model.logits(hidden[:, 0])
        temperature = slots.answer_temperature
        self._slots, entry, sampled = advance(slots, logits, self._tables, self._key(), self.options)
        return entry, sampled, temperature

    def chunk(self) -> list[mx.array]:
        """`steps_per_read` steps; each is started as soon as it is built. (steps, B) arrays."""
        entries = []
        for _ in range(self.options.steps_per_read):
            entry = self.step()
            start_evaluating([*entry, *self._slots])
            entries.append(entry)
        logs = [mx.stack([e[i] for e in entries]) for i in range(3)]
        start_evaluating(logs)
        return logs

    def run(self, seconds: float | None = None, num_steps: int | None = None) -> Iterator[Documents]:
        """The documents of each chunk, until the time or the steps are over."""
        began = time.monotonic()
        running: list[list[mx.array]] = []
        num_chunks = 0
        while True:
            is_over = seconds is not None and time.monotonic() - began > seconds
            is_over |= num_steps is not None and num_chunks * self.options.steps_per_read >= num_steps
            if not is_over:
                running.append(self.chunk())
                num_chunks += 1
            if len(running) > 1 or (is_over and running):  # read one chunk while the next runs
                entries, sampled, temperatures = (np.array(a) for a in running.pop(0))
                yield self._cut(entries, sampled, temperatures)
            if is_over and not running:
                return

    def _cut(self, entries: np.ndarray, sampled: np.ndarray, temperatures: np.ndarray) -> Documents:
        """Finish the documents that ended in this chunk."""
        self.num_slot_tokens += entries.size
        self.num_bad_prompts += int(((entries & BAD) > 0).sum())
        found: list[tuple[np.ndarray, int, float, int, bool]] = []
        for b in range(entries.shape[1]):
            column = entries[:, b]
            at = 0
            for end in np.flatnonzero(column & (ENDED | BAD)):
                self._open[b].append(column[at : end + 1])
                if column[end] & ENDED:
                    whole = np.concatenate(self._open[b])
                    made = self._document(whole, int(sampled[end, b]), float(temperatures[end, b]))
                    if made is not None:
                        found.append(made)
                self._open[b] = []
                at = int(end) + 1
            if at < len(column):
                self._open[b].append(column[at:])
        return pack(found, self.target.shape.vocab_size)

    def _document(
        self, entries: np.ndarray, last: int, temperature: float
    ) -> tuple[np.ndarray, int, float, int, bool] | None:
        """(tokens, prompt length, temperature, split, looped), or None for a prompt that was there before."""
        tokens = np.append(entries & TOKEN_MASK, last)
        prompt = int(((entries >> PHASE_SHIFT) & 3 != ANSWER).sum())
        self.num_answer_tokens += len(tokens) - prompt
        key = tokens[:prompt].astype(np.uint32).tobytes()
        if key in self._seen or len(tokens) - prompt < 2:
            return None
        self._seen.add(key)
        self.num_documents += 1
        looped = is_looped(tokens[prompt:])
        self.num_looped += looped
        split = HELD_OUT if _share(key) < self.options.held_out_share else TRAIN
        if looped and split == TRAIN:  # its beginning is as good as any other text
            whole = tokens
            tokens = np.concatenate([tokens[:prompt], before_loop(tokens[prompt:])])
            if not MIN_BEFORE_LOOP <= len(tokens) - prompt < len(whole) - prompt:
                return None
            looped = False
        return tokens, prompt, temperature, split, looped


class Tables(NamedTuple):
    """`prefixes` (P, F) padded, `lengths` (P,), cumulated `shares` (P,), `turn` (T,), `special` (V,) bool."""

    prefixes: mx.array
    lengths: mx.array
    shares: mx.array
    turn: mx.array
    special: mx.array


def fresh(num_slots: int, tables: Tables, key: mx.array) -> Slots:
    """Slots at the start of their lives."""
    keys = mx.random.split(key, 3)
    draw = mx.random.uniform(shape=(num_slots, 1), key=keys[0])
    row = mx.minimum((tables.shares[None] <= draw).sum(axis=1), tables.shares.size - 1).astype(mx.int32)
    zero = mx.zeros((num_slots,), dtype=mx.int32)
    return Slots(
        token=tables.prefixes[row, 0],
        position=zero,
        phase=zero + PREFIX,
        row=row,
        num_tokens=zero + 1,
        user_temperature=_choose(USER_TEMPERATURES, num_slots, keys[1]),
        answer_temperature=_choose(ANSWER_TEMPERATURES, num_slots, keys[2]),
    )


def _choose(values: tuple[float, ...], count: int, key: mx.array) -> mx.array:
    index = mx.random.randint(0, len(values), shape=(count,), key=key)
    return mx.take(mx.array(values), index)


def advance(
    slots: Slots, logits: mx.array, tables: Tables, key: mx.array, options: GenerateOptions
) -> tuple[Slots, mx.array, mx.array]:
    """(the slots' next state, log entries, sampled tokens)."""
    limits = (options.capacity, options.max_answer, options.min_user, options.max_user)
    state, entry, sampled = _advance(tuple(slots), logits, tuple(tables), key, limits, options.min_p)
    return Slots(*state), entry, sampled


def _advance(
    state: tuple[mx.array, ...],
    logits: mx.array,
    constants: tuple[mx.array, ...],
    key: mx.array,
    limits: tuple[int, int, int, int],
    min_p: float,
) -> tuple[tuple[mx.array, ...], mx.array, mx.array]:
    s, tables = Slots(*state), Tables(*constants)
    capacity, max_answer, min_user, max_user = limits
    turn_size = tables.turn.size
    keys = mx.random.split(key, 2)
    is_in_prefix = (s.phase == PREFIX) & (s.position + 1 < tables.lengths[s.row])
    is_in_turn = (s.phase == TURN) & (s.num_tokens < turn_size)
    writes_user = ((s.phase == PREFIX) & ~is_in_prefix) | (s.phase == USER)
    writes_answer = ((s.phase == TURN) & ~is_in_turn) | (s.phase == ANSWER)
    temperature = mx.where(writes_answer, s.answer_temperature, s.user_temperature)
    sampled = sample(logits, temperature, min_p, keys[0])

    num_user = mx.where(s.phase == USER, s.num_tokens, 0)
    closes = writes_user & (sampled == tables.turn[0]) & (num_user >= min_user)
    is_special = tables.special[sampled]
    is_bad = writes_user & ~closes & (is_special | (num_user >= max_user))
    num_answer = mx.where(s.phase == ANSWER, s.num_tokens, 0)
    is_full = (num_answer + 1 >= max_answer) | (s.position + 2 >= capacity)
    has_ended = writes_answer & (is_special | is_full)

    phase = mx.where(is_in_prefix, PREFIX, mx.where(closes | is_in_turn, TURN, mx.where(writes_user, USER, ANSWER)))
    count = mx.where(phase == s.phase, s.num_tokens + 1, 1)
    forced = mx.where(
        is_in_prefix,
        tables.prefixes[s.row, mx.minimum(s.position + 1, tables.prefixes.shape[1] - 1)],
        tables.turn[mx.where(is_in_turn, mx.minimum(s.num_tokens, turn_size - 1), 0)],
    )
    token = mx.where(is_in_prefix | is_in_turn | closes, forced, sampled)
    moved = Slots(
        token, s.position + 1, phase, s.row, count, s.user_temperature, s.answer_temperature
    )  # fmt: skip
    begun = fresh(s.token.shape[0], tables, keys[1])
    restarts = is_bad | has_ended
    following = tuple(mx.where(restarts, new, old).astype(old.dtype) for new, old in zip(begun, moved, strict=True))
    entry = s.token + (s.phase << PHASE_SHIFT) + mx.where(has_ended, ENDED, 0) + mx.where(is_bad, BAD, 0)
    return following, entry.astype(mx.int32), sampled


def pack(found: list[tuple[np.ndarray, int, float, int, bool]], vocab_size: int) -> Documents:
    kind: Any = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    tokens = [d[0].astype(kind) for d in found]
    return Documents(
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=kind),
        lengths=np.array([len(t) for t in tokens], dtype=np.int32),
        prompts=np.array([d[1] for d in found], dtype=np.int32),
        temperatures=np.array([d[2] for d in found], dtype=np.float32),
        split=np.array([d[3] for d in found], dtype=np.uint8),
        looped=np.array([d[4] for d in found], dtype=bool),
    )


def _share(key: bytes) -> float:
    """A number in 0..1 that a prompt always gets, so that no prompt is both trained on and held out."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32
