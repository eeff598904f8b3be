"""Attention over pages: the reference against the slots' stock path, the choice between them, and the CUDA source."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import BadConfig
from workers.cache import paged
from workers.cache.spec import AttentionSpec
from workers.cache.store import CacheStore
from workers.kernels import prove as proving
from workers.kernels import select as selecting
from workers.kernels.base import MAX_ROWS, HeadNorms, Variant
from workers.kernels.choice import AttentionChoice, Form, ShapeClass
from workers.kernels.cuda import CudaAttention, max_rows, num_parts, shared_bytes, supports
from workers.kernels.metal import combine
from workers.kernels.pages import Pages, Pool, slot_pages, tiles
from workers.kernels.prove import cache_error, largest_error, prove, seconds, tiles_are_right
from workers.kernels.reference import ReferenceAttention
from workers.kernels.reference import apart as apart_rows
from workers.models.rope import Rope, RopeParameters, Rotation

HEADS, KV_HEADS, DIM = 6, 2, 16
ALL_WIDTHS = {ShapeClass(HEADS, KV_HEADS, DIM, r, mx.float32): True for r in (0, 1, 2, 4, 8, 16)}


class Off(ReferenceAttention):
    """Gives other values than it should."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return super().attend(q, k, v, pool, pages, variant) + 1.0


class Broken(ReferenceAttention):
    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        raise RuntimeError("does not compile")


class Reader(ReferenceAttention):
    """Counts the calls of layers that write nothing."""

    num_read = 0

    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        self.num_read += 1
        return super().attend_written(q, pool, pages, variant)


class OffWhenShared(ReferenceAttention):
    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return super().attend_written(q, pool, pages, variant) + 1.0


def attend_through(store: CacheStore, slots: list[int], starts: list[int], tensors: list[mx.array]) -> mx.array:
    """One layer's output, rows in the order of `slots`."""
    batch = store.open(slots, starts, tensors[0].shape[2])
    ordered = [t[mx.array(batch.order)] for t in tensors]
    out = batch.layers[0].attend(*ordered, DIM**-0.5)  # type: ignore[union-attr] # a KVView
    return out[mx.array(np.argsort(batch.order))]


@pytest.mark.parametrize("window", [None, 24])
def test_pages_attend_as_slots_do_through_joins_leaves_and_roll_backs(window: int | None) -> None:
    choose = random.Random(7)
    spec = AttentionSpec(KV_HEADS, DIM, DIM, window)
    stock, paged = (CacheStore([spec], [64, 192], 64, mx.float32, is_exact=False, slack=64) for _ in "ab")
    paged.use_attention(AttentionChoice(ReferenceAttention(), ALL_WIDTHS, has_tiles=True))
    limits = {0: 64, 1: 64, 2: 192, 3: 192}
    lengths: dict[int, int] = {}
    num_compared = 0
    for _ in range(60):
        if lengths and choose.random() < 0.1:
            slot = choose.choice(list(lengths))
            del lengths[slot]
            for store in (stock, paged):
                store.release(slot)
        for slot in set(limits) - set(lengths):
            lengths[slot] = 0
            for store in (stock, paged):
                store.ensure(slot, limits[slot])
        is_chunk = choose.random() < 0.2
        width = choose.choice([33, 48, 64]) if is_chunk else choose.choice([1, 2, 4, 8, 16, 32])
        slots = choose.sample(sorted(lengths), 1 if width == 33 else choose.randint(1, 4))  # others go by tiles
        slots = [s for s in slots if lengths[s] + width <= limits[s]]
        if not slots:
            continue
        tensors = [mx.random.normal((len(slots), h, width, DIM)) for h in (HEADS, KV_HEADS, KV_HEADS)]
        starts = [lengths[s] for s in slots]
        a, b = (attend_through(store, slots, starts, tensors) for store in (stock, paged))
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5)
        num_compared += len(slots)
        for slot in slots:  # the rest of the row is rolled back
            lengths[slot] += width if is_chunk else choose.randint(1, width)
    assert num_compared > 40


def test_blocks_and_slots_hold_the_same_sequence() -> None:
    starts = (37, 5)
    dense = [mx.random.normal((2, KV_HEADS, 64, DIM)) for _ in "kv"]
    table = mx.array([[5, 2, 7, 0], [3, 6, 1, 4]], dtype=mx.int32)
    blocks = []
    for array in dense:
        pool = mx.zeros((8, KV_HEADS, 16, DIM))
        for b in range(2):
            for i in range(4):
                pool[int(table[b, i])] = array[b, :, i * 16 : (i + 1) * 16]
        blocks.append(pool)
    q, k, v = (mx.random.normal((2, h, 4, DIM)) for h in (HEADS, KV_HEADS, KV_HEADS))
    variant = Variant(0.2, window=30, softcap=5.0, sinks=mx.random.normal((HEADS,)))
    reference = ReferenceAttention()
    slots, paged = Pool(*dense), Pool(*blocks)
    pages = Pages(table, mx.array(starts, dtype=mx.int32), starts, 4)
    a = reference.attend(q, k, v, slots, slot_pages([0, 1], starts), variant)
    b = reference.attend(q, k, v, paged, pages, variant)
    np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-6)
    np.testing.assert_array_equal(np.array(paged.keys[5, :, 0]), np.array(slots.keys[0, :, 0]))
    np.testing.assert_array_equal(np.array(paged.keys[7, :, 5:9]), np.array(k[0]))  # position 37 is in block 2 at 5


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("width", [1, 4, 16])
def test_rows_that_another_layer_wrote_are_attended_as_by_the_layer_itself(width: int, window: int | None) -> None:
    spec = AttentionSpec(KV_HEADS, DIM, DIM, window)
    rope = Rope(RopeParameters(tuple(10000.0 ** (-i / DIM) for i in range(0, DIM, 2))))
    shared = {ShapeClass(HEADS, KV_HEADS, DIM, width, mx.float32, is_shared=True): True}
    reader = Reader()
    stock, paged = (CacheStore([spec], [64, 192], 32, mx.float32, is_exact=False, slack=64) for _ in "ab")
    paged.use_attention(AttentionChoice(reader, ALL_WIDTHS | shared))
    for start in range(0, 160, width):  # the ring of 96 wraps
        tensors = [mx.random.normal((3, heads, width, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        other = mx.random.normal(tensors[0].shape)
        outs = []
        for store in (stock, paged):
            for slot, limit in enumerate((192, 64, 192)):
                store.ensure(slot, limit)
            batch = store.open([0, 1, 2], [start, start % 48, start // 2], width)
            q, k, v, again = (t[mx.array(batch.order)] for t in (*tensors, other))
            view = batch.layers[0]
            rotate = rope.at(view.offset, width, 3, is_cpu=False)
            view.attend(q, k, v, 0.25, rotation=rotate)  # type: ignore[union-attr] # a KVView
            outs.append(view.attend(again, None, None, 0.25, rotation=rotate))  # type: ignore[union-attr]
        np.testing.assert_allclose(np.array(outs[0]), np.array(outs[1]), atol=2e-5)
    assert reader.num_read == 2 * len(range(0, 160, width)), "two pools, of one class each"


def test_a_kernel_waits_for_the_one_before_on_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading for the write that it reads, the next write for that reading; also where the key axis is split."""
    launches: list[tuple[str, dict[str, mx.array], list[mx.array]]] = []
    splits: set[int] = set()

    def fake_kernel(name: str, input_names: list[str], **_: object) -> Callable[..., list[mx.array]]:
        def launch(
            inputs: list[mx.array], output_shapes: list[tuple[int, ...]], grid: tuple[int, int, int], **_: object
        ) -> list[mx.array]:
            splits.add(grid[2])
            launches.append((name, dict(zip(input_names, inputs, strict=True)), [mx.zeros(s) for s in output_shapes]))
            return launches[-1][2]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", fake_kernel)
    kernel = CudaAttention()
    q, k, v = (mx.zeros((1, heads, 2, 64)) for heads in (8, 2, 2))
    for length, num_parts_expected in ((40, 1), (4000, 15)):
        launches.clear()
        splits.clear()
        pool = Pool(mx.zeros((1, 2, 4096, 64)), mx.zeros((1, 2, 4096, 64)))
        pages = slot_pages([0], [length])
        for _ in "ab":
            kernel.attend(q, k, v, pool, pages, Variant(1.0))
            for _ in "cd":
                kernel.attend_written(q, pool, pages, Variant(1.0))
            joined = kernel.attend_joined(mx.zeros((1, 2, 12 * 64)), 8, pool, pages, Variant(1.0))
            assert joined.shape == (1, 2, 8 * 64)
        names = [name.partition("_64_")[0] for name, _, _ in launches]
        kinds = ["attend", "attend_written", "attend_written", "attend_joined"]
        assert names == [f"tandem_{kind}" for kind in kinds] * 2
        assert splits == {num_parts_expected}
        for before, (_, inputs, _) in pairwise(launches):
            assert inputs["after"] is before[2][0]
            assert inputs["pool_k"] is pool.keys
        assert pool.last is launches[-1][2][0]


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("width", [1, 4])
def test_rows_of_one_product_are_attended_as_those_apart(width: int, window: int | None, has_norms: bool) -> None:
    spec = AttentionSpec(KV_HEADS, DIM, DIM, window)
    rope = Rope(RopeParameters(tuple(10000.0 ** (-i / DIM) for i in range(0, DIM, 2))))
    form: Form = "normed" if has_norms else "joined"
    used = ALL_WIDTHS | {ShapeClass(HEADS, KV_HEADS, DIM, width, mx.float32, form=form): True}
    norms = HeadNorms(mx.random.normal((DIM,)), mx.random.normal((DIM,)), 1e-5) if has_norms else None
    apart, joined = (CacheStore([spec], [64, 192], 32, mx.float32, is_exact=False, slack=64) for _ in "ab")
    joined.use_attention(AttentionChoice(ReferenceAttention(), used))
    for start in range(0, 160, width):  # the ring of 96 wraps
        qkv = mx.random.normal((3, width, (HEADS + 2 * KV_HEADS) * DIM))
        outs = []
        for store in (apart, joined):
            for slot, limit in enumerate((192, 64, 192)):
                store.ensure(slot, limit)
            batch = store.open([0, 1, 2], [start, start % 48, start // 2], width)
            rows, view = qkv[mx.array(batch.order)], batch.layers[0]
            rotate = rope.at(view.offset, width, 3, is_cpu=False)
            out = view.attend_joined(rows, HEADS, 0.25, rotation=rotate, norms=norms)  # type: ignore[union-attr]
            assert (out is None) == (store is apart), "without a kernel nothing is done"
            if out is None:
                split = apart_rows(rows, HEADS, KV_HEADS, norms)
                out = view.attend(*split, 0.25, rotation=rotate).swapaxes(1, 2).reshape(3, width, -1)  # type: ignore[union-attr]
            outs.append(out)
        np.testing.assert_allclose(np.array(outs[0]), np.array(outs[1]), atol=2e-5)


@pytest.mark.parametrize("form", ["joined", "normed"])
def test_joined_rows_are_checked_and_timed_by_themselves(form: Form) -> None:
    shape = ShapeClass(HEADS, KV_HEADS, DIM, 2, mx.float32, form=form)
    assert shape.name == f"2 query rows, 6/2 heads of 16, float32, {form}"
    assert largest_error(ReferenceAttention(), shape, is_paged=True) == 0
    assert seconds(ReferenceAttention(), shape, rows=2, context=64) > 0
    assert seconds(None, shape, rows=2, context=64) > 0

    class OffWhenJoined(ReferenceAttention):
        def attend_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
            assert (variant.norms is None) == (form == "joined")
            return super().attend_joined(qkv, num_heads, pool, pages, variant) + 1.0

    (off,) = prove(OffWhenJoined(), [shape])
    assert "off by" in off.reason


def test_layers_with_one_product_are_asked_for_by_it_and_their_chunks_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "machine_kernel", ReferenceAttention)
    choice = selecting.select(
        [(AttentionSpec(KV_HEADS, 64, 64), HEADS)], mx.float32, "kernel", is_speculative=True, cache_folder=tmp_path,
        widths=[1, 0, 4, 16], form="joined",
    )  # fmt: skip
    assert choice is not None
    assert [(s.rows, s.form) for s in choice.is_used] == [
        (1, "joined"), (4, "joined"), (16, "joined"), (0, "apart"),
    ]  # fmt: skip
    assert choice.joined(AttentionSpec(KV_HEADS, 64, 64), HEADS, mx.float32, 4, False) is choice.attention
    assert choice.joined(AttentionSpec(KV_HEADS, 64, 64), HEADS, mx.float32, 4, True) is None
    assert choice.joined(AttentionSpec(KV_HEADS, 64, 64), HEADS, mx.float32, 2, False) is None
    assert choice.has_tiles
    assert choice.joined(AttentionSpec(KV_HEADS, 64, 64), HEADS, mx.float32, 48, False) is choice.attention
    assert choice.joined(AttentionSpec(KV_HEADS, 64, 64), HEADS, mx.float32, 40, False) is None


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_chunks_of_one_product_go_by_tiles(window: int | None, has_norms: bool) -> None:
    """Chunks of 48 tokens in sequences that begin at different places, and MLX's own operation where all begin at 0."""
    spec = AttentionSpec(KV_HEADS, DIM, DIM, window)
    rope = Rope(RopeParameters(tuple(10000.0 ** (-i / DIM) for i in range(0, DIM, 2))))
    form: Form = "normed" if has_norms else "joined"
    used = {ShapeClass(HEADS, KV_HEADS, DIM, 16, mx.float32, form=form): True}
    norms = HeadNorms(mx.random.normal((DIM,)), mx.random.normal((DIM,)), 1e-5) if has_norms else None
    stock, tiled = (CacheStore([spec], [256], 64, mx.float32, is_exact=False, slack=64) for _ in "ab")
    tiled.use_attention(AttentionChoice(ReferenceAttention(), used, has_tiles=True))
    for starts in ([0, 0], [0, 48], [48, 96], [96, 144]):
        qkv = mx.random.normal((2, 48, (HEADS + 2 * KV_HEADS) * DIM))
        outs = []
        for store in (stock, tiled):
            for slot in (0, 1):
                store.ensure(slot, 256)
            batch = store.open([0, 1], starts, 48)
            rows, view = qkv[mx.array(batch.order)], batch.layers[0]
            rotate = rope.at(view.offset, 48, 2, is_cpu=False)
            out = view.attend_joined(rows, HEADS, 0.25, rotation=rotate, norms=norms)  # type: ignore[union-attr]
            assert (out is None) == (store is stock or starts == [0, 0])
            if out is None:
                split = apart_rows(rows, HEADS, KV_HEADS, norms)
                out = view.attend(*split, 0.25, rotation=rotate).swapaxes(1, 2).reshape(2, 48, -1)  # type: ignore[union-attr]
            outs.append(out)
        np.testing.assert_allclose(np.array(outs[0]), np.array(outs[1]), atol=2e-5)


def test_a_rotation_given_to_the_cache_is_the_models_own() -> None:
    rope = Rope(RopeParameters(tuple(10000.0 ** (-i / DIM) for i in range(0, DIM, 2))))
    spec = AttentionSpec(KV_HEADS, DIM, DIM)
    outs = []
    for choice in (None, AttentionChoice(ReferenceAttention(), ALL_WIDTHS)):
        mx.random.seed(3)
        store = CacheStore([spec], [64], 64, mx.float32, is_exact=False, slack=64)
        store.use_attention(choice)
        for slot in (0, 1):
            store.ensure(slot, 64)
        batch = store.open([0, 1], [0, 0], 4)
        view = batch.layers[0]
        q, k, v = (mx.random.normal((2, h, 4, DIM)) for h in (HEADS, KV_HEADS, KV_HEADS))
        rotate = rope.at(view.offset, 4, 2, is_cpu=False)
        assert isinstance(rotate, Rotation)
        if choice is None:
            q, k = (rotate(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k))
            outs.append(view.attend(q, k, v, 0.25))  # type: ignore[union-attr] # a KVView
        else:
            outs.append(view.attend(q, k, v, 0.25, rotation=rotate))  # type: ignore[union-attr] # a KVView
    np.testing.assert_allclose(np.array(outs[0]), np.array(outs[1]), atol=1e-5)


def test_a_kernel_that_is_off_or_fails_is_not_used() -> None:
    shape = ShapeClass(HEADS, KV_HEADS, DIM, 1, mx.float32)
    (off,), (broken,) = prove(Off(), [shape]), prove(Broken(), [shape])
    assert not off.is_used
    assert "off by" in off.reason
    assert not broken.is_used
    assert "does not compile" in broken.reason


def test_a_kernel_that_is_right_and_slower_is_not_used_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ShapeClass(HEADS, KV_HEADS, DIM, 1, mx.float32)
    monkeypatch.setattr(proving, "seconds", lambda attention, shape, **_: 2e-6 if attention is not None else 1e-6)
    (slow,), (forced,) = prove(ReferenceAttention(), [shape]), prove(ReferenceAttention(), [shape], is_forced=True)
    assert not slow.is_used
    assert "2 us a layer against 1" in slow.reason
    assert forced.is_used


def test_both_paths_are_timed_through_the_slots_cache_and_kernels_in_blocks() -> None:
    shape = ShapeClass(HEADS, KV_HEADS, DIM, 1, mx.float32)
    assert seconds(ReferenceAttention(), shape, rows=2, context=64) > 0

    class InBlocks(ReferenceAttention):
        def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
            assert pages.shift == 5
            assert (np.array(pages.table)[:, :2] > 0).all(), "all that is attended to has a block"
            return super().attend(q, k, v, pool, pages, variant)

    assert seconds(InBlocks(), shape, rows=2, context=64, is_paged=True) > 0
    assert seconds(None, shape, rows=2, context=64) > 0


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 8])
def test_the_check_of_values_passes_the_reference(rows: int, is_paged: bool) -> None:
    shape = ShapeClass(HEADS, KV_HEADS, DIM, rows, mx.float32)
    assert largest_error(ReferenceAttention(), shape, is_paged=is_paged) == 0


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        *(ShapeClass(HEADS, KV_HEADS, DIM, rows, mx.float32) for rows in (0, 1, 8)),
        *(ShapeClass(HEADS, KV_HEADS, DIM, 4, mx.float32, form=form) for form in ("joined", "normed")),
        ShapeClass(HEADS, KV_HEADS, DIM, 2, mx.float32, is_shared=True),
    ],
    ids=lambda shape: shape.name,
)
def test_the_way_through_the_caches_is_checked_too(shape: ShapeClass, is_paged: bool) -> None:
    assert 0 <= cache_error(ReferenceAttention(), shape, is_paged=is_paged) < 1e-4


class ByPointer(ReferenceAttention):
    """Takes a table as a kernel does: from its first number on, whatever its strides are."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        held = np.array(pages.table, copy=False)
        numbers = np.lib.stride_tricks.as_strided(held, (held.size,), (4,)).reshape(held.shape).copy()
        return super().attend(q, k, v, pool, replace(pages, table=mx.array(numbers)), variant)


def test_a_table_that_is_part_of_a_larger_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX keeps NumPy's strides, which a kernel does not see."""
    shape = ShapeClass(HEADS, KV_HEADS, DIM, 1, mx.float32)
    assert cache_error(ByPointer(), shape, is_paged=True) < 1e-4
    monkeypatch.setattr(paged.np, "ascontiguousarray", lambda array: array)
    assert cache_error(ByPointer(), shape, is_paged=True) > 0.1
    monkeypatch.setattr(proving, "seconds", lambda attention, shape, **_: 1e-6)
    (off,) = prove(ByPointer(), [shape], is_paged=True)
    assert "off by" in off.reason


@pytest.mark.parametrize("rows", [1, 8])
def test_reading_alone_is_checked_and_timed_by_itself(rows: int) -> None:
    shape = ShapeClass(HEADS, KV_HEADS, DIM, rows, mx.float32, is_shared=True)
    reader = Reader()
    assert largest_error(reader, shape, is_paged=True) == 0
    assert reader.num_read == 3
    assert seconds(reader, shape, rows=2, context=64) > 0
    assert reader.num_read > 3
    assert seconds(None, shape, rows=2, context=64) > 0
    (off,) = prove(OffWhenShared(), [shape])
    assert not off.is_used
    assert off.reason.startswith(
        f"{rows} query rows, 6/2 heads of 16, float32, keys of another layer: stock, the kernel"
    )


def test_layers_that_share_keys_are_asked_for_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = (AttentionSpec(KV_HEADS, 512, 512), HEADS), (AttentionSpec(KV_HEADS, 64, 64), HEADS)
    monkeypatch.setattr(selecting, "machine_kernel", ReferenceAttention)
    choice = selecting.select(
        [wide, narrow], mx.float32, "kernel", is_speculative=False, cache_folder=tmp_path, widths=[1, 0, 4],
        shared=[wide, narrow],
    )  # fmt: skip
    assert choice is not None
    assert [(s.dim, s.rows, s.is_shared) for s in choice.is_used] == [
        (64, 1, False), (64, 0, False), (64, 4, False), (64, 1, True), (64, 4, True),
    ]  # fmt: skip


def test_the_choice_is_by_shape_class() -> None:
    choice = AttentionChoice(ReferenceAttention(), {ShapeClass(HEADS, KV_HEADS, DIM, 1, mx.float32): True})
    spec, q, v = AttentionSpec(KV_HEADS, DIM, DIM), mx.zeros((1, HEADS, 1, DIM)), mx.zeros((1, KV_HEADS, 1, DIM))
    assert choice.use(spec, q, v, 1) is not None
    assert choice.use(spec, q, v, 4) is None
    assert choice.shared(spec, q, 1) is None
    reads = AttentionChoice(ReferenceAttention(), {ShapeClass(HEADS, KV_HEADS, DIM, 1, mx.float32, True): True})
    assert reads.use(spec, q, v, 1) is None
    assert reads.shared(spec, q, 1) is reads.attention
    assert reads.shared(spec, q, 33) is None
    assert choice.use(spec, q.astype(mx.float16), v, 1) is None


def test_what_was_found_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [(AttentionSpec(KV_HEADS, 64, 64), HEADS)]
    monkeypatch.setattr(selecting, "machine_kernel", Off)
    first = selecting.select(layers, mx.float32, "auto", is_speculative=False, cache_folder=tmp_path)
    assert first is not None
    assert not any(first.is_used.values())
    (kept,) = (tmp_path / selecting.FORMAT).iterdir()
    found = json.loads(kept.read_text())
    kept.write_text(json.dumps({**found, "reasons": ["as found before"]}))
    second = selecting.select(layers, mx.float32, "auto", is_speculative=False, cache_folder=tmp_path)
    assert second is not None
    assert second.reasons == ("as found before",)
    with pytest.raises(BadConfig, match="off by"):
        selecting.select(layers, mx.float32, "kernel", is_speculative=False, cache_folder=tmp_path)
    assert selecting.select(layers, mx.float32, "stock", is_speculative=False, cache_folder=tmp_path) is None


def test_what_was_found_without_graphs_is_not_taken_for_what_is_found_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = [ShapeClass(16, 8, 256, 1, mx.bfloat16)]
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "0")
    without = selecting.fingerprint(shapes)
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS")
    assert selecting.fingerprint(shapes) != without
    assert selecting.fingerprint([ShapeClass(16, 8, 256, 1, mx.bfloat16, True)]) != selecting.fingerprint(shapes)


def test_asking_for_a_kernel_where_there_is_none_says_so(tmp_path: Path) -> None:
    layers = [(AttentionSpec(KV_HEADS, 64, 64), HEADS)]
    assert selecting.select(layers, mx.float32, "auto", is_speculative=True, cache_folder=tmp_path) is None
    with pytest.raises(BadConfig, match="no attention kernel"):
        selecting.select(layers, mx.float32, "kernel", is_speculative=True, cache_folder=tmp_path)


def test_parts_of_the_key_axis_join_to_one_softmax() -> None:
    """Metal's second pass, and the CUDA kernel's: parts of 24 keys, one part without any."""
    rows, group, kv_heads = 2, 3, 2
    scores = mx.random.normal((1, kv_heads, rows * group, 24)) * 3
    values = mx.random.normal((1, kv_heads, 1, 24, DIM))
    sinks = mx.random.normal((kv_heads * group,))
    cuts = [(0, 10), (10, 24)]
    tops = [scores[..., a:b].max(axis=-1) for a, b in cuts]
    parts = [mx.exp(scores[..., a:b] - t[..., None]) for (a, b), t in zip(cuts, tops, strict=True)]
    partial = [(p[..., None] * values[..., a:b, :]).sum(axis=-2) for p, (a, b) in zip(parts, cuts, strict=True)]
    stats = [mx.stack([t, p.sum(axis=-1)], axis=-1) for t, p in zip(tops, parts, strict=True)]
    partial.append(mx.zeros_like(partial[0]))
    stats.append(mx.stack([mx.full(tops[0].shape, -mx.inf), mx.zeros(tops[0].shape)], axis=-1))
    joined = combine(mx.stack(partial, axis=-2), mx.stack(stats, axis=-2), Variant(1.0, sinks=sinks), rows)
    by_query = mx.tile(sinks.reshape(kv_heads, 1, group), (1, rows, 1)).reshape(1, kv_heads, rows * group, 1)
    weights = mx.softmax(mx.concatenate([by_query, scores], axis=-1), axis=-1)[..., 1:]
    whole = (weights[..., None] * values).sum(axis=-2).reshape(kv_heads, rows, group, DIM)
    np.testing.assert_allclose(
        np.array(joined), np.array(whole.swapaxes(1, 2).reshape(1, kv_heads * group, rows, DIM)), atol=1e-5
    )


def test_kernels_that_exist_fit_their_shared_memory() -> None:
    for dim in (64, 80, 96, 128, 192, 256):
        for group in (1, 3, 4, 8, 16):
            for itemsize in (2, 4):
                rows = max_rows(dim, itemsize)
                assert supports(group * 2, 2, dim, itemsize, rows) == (
                    shared_bytes(group * rows, dim, itemsize) <= 48 << 10
                )
                assert num_parts(group * rows, dim, itemsize) * 32 >= group * rows
    assert not supports(8, 2, 64, 2, 17)
    assert not supports(8, 2, 72, 2, 1)


@pytest.mark.parametrize("rows", [[3], [3, 0]])
def test_the_tables_of_tiles_lie_contiguous(rows: list[int]) -> None:
    """A kernel reads them by their pointer, and MLX repeats one row as a view without memory of its own."""
    cut = tiles(slot_pages(rows, [40] * len(rows)), 16, 4)
    mx.eval(cut.table, cut.starts)
    for array in (cut.table, cut.starts):
        assert memoryview(array).c_contiguous  # type: ignore[arg-type] # an array offers the buffer protocol
    assert np.array(cut.table)[:, 0].tolist() == [r for r in rows for _ in range(4)]
    assert np.array(cut.starts).tolist() == [40, 56, 72, 88] * len(rows)
    assert cut.host_starts == (40, 56, 72, 88) * len(rows)


def test_a_chunk_goes_by_tiles_only_where_a_kernel_appends_it() -> None:
    """Forced on a machine whose kernels take verify rows but no chunks, as Metal's do."""

    class NoChunks(ReferenceAttention):
        def append(self, *_: object) -> tuple[mx.array, mx.array]:
            raise NotImplementedError("no kernel for chunks")

    spec = AttentionSpec(KV_HEADS, DIM, DIM)
    without_chunks = {shape: True for shape in ALL_WIDTHS if shape.rows != 0}
    tensors = [mx.random.normal((1, heads, 32, DIM), key=mx.random.key(heads)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    outputs = []
    for choice in (None, AttentionChoice(NoChunks(), without_chunks, has_tiles=True)):
        store = CacheStore([spec], [64], 64, mx.float32, is_exact=False, slack=64)
        store.use_attention(choice)
        store.ensure(0, 64)
        attend_through(store, [0], [0], [t[:, :, :1] for t in tensors])
        outputs.append(attend_through(store, [0], [1], tensors))
    np.testing.assert_allclose(np.array(outputs[1]), np.array(outputs[0]), atol=1e-5)


class OffInTiles(ReferenceAttention):
    """Right, but for sequences of which it gets several rows: one position too far."""

    def attend(self, q, k, v, pool, pages, variant):
        if len({tuple(row) for row in pages.table.tolist()}) < pages.num_rows:
            pages = replace(pages, starts=pages.starts + 1, host_starts=tuple(s + 1 for s in pages.host_starts))
        return super().attend(q, k, v, pool, pages, variant)


class FailingInTiles(ReferenceAttention):
    def append(self, k, v, pool, pages, old):
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("form", ["joined", "normed"])
def test_tiles_of_joined_rows_prove_themselves_at_start(form: Form) -> None:
    class OffInJoinedTiles(ReferenceAttention):
        """Writes a chunk's rows one position too far."""

        def append_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> None:
            later = replace(pages, starts=pages.starts + 1, host_starts=tuple(s + 1 for s in pages.host_starts))
            super().append_joined(qkv, num_heads, pool, later, variant)

    shapes = [ShapeClass(4, 2, 16, rows, mx.float32, form=form) for rows in (1, MAX_ROWS)]
    assert tiles_are_right(ReferenceAttention(), shapes)
    assert not tiles_are_right(OffInJoinedTiles(), shapes)


@pytest.mark.parametrize(
    ("attention", "is_right"), [(ReferenceAttention, True), (OffInTiles, False), (FailingInTiles, False)]
)
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("is_paged", [False, True])
def test_tiles_prove_themselves_at_start(
    attention: type[ReferenceAttention], is_right: bool, dim: int, is_paged: bool
) -> None:
    shapes = [ShapeClass(4, 2, dim, rows, mx.float32) for rows in (1, 0, MAX_ROWS)]
    assert tiles_are_right(attention(), shapes, is_paged=is_paged) == is_right


def test_tiles_that_are_off_are_left_out_of_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [(AttentionSpec(2, 64, 64), 4)]
    for attention, has_tiles in ((ReferenceAttention, True), (OffInTiles, False)):
        monkeypatch.setattr(selecting, "machine_kernel", attention)
        choice = selecting.select(
            layers, mx.float32, "kernel", is_speculative=True, cache_folder=tmp_path, widths=[1, 0, MAX_ROWS]
        )
        assert choice is not None
        assert choice.has_tiles == choice.takes_any_starts == has_tiles
