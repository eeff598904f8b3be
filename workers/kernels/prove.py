"""Checks a kernel on this machine before it serves: values against the reference, time against the stock path."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import mlx.core as mx

from workers.arrays import start_evaluating
from workers.cache.kv import KVView
from workers.cache.paged import PagedStore
from workers.cache.spec import AttentionSpec
from workers.cache.store import CacheStore
from workers.kernels.base import MAX_ROWS, HeadNorms, PagedAttention, Variant
from workers.kernels.choice import AttentionChoice, ShapeClass
from workers.kernels.pages import Pages, Pool, slot_pages, tiles
from workers.kernels.reference import ReferenceAttention, apart
from workers.kernels.tiles import attend_in_tiles, attend_joined_in_tiles
from workers.models.rope import Rope, RopeParameters, Rotate, Rotation

logger = logging.getLogger("target")

TOLERANCE = {mx.float32: 5e-3, mx.float16: 2e-2, mx.bfloat16: 4e-2}  # of values of about 1; 32-bit products may be TF32
# Here a pool is small and nobody else's. A stock write to one that a step on the device still reads copies all of it.
CHUNK_SHARE = 1.5
CHECKED, CHECKED_CAPACITY = 256, 1024  # tokens of a sequence in the caches, and their room
PROVED_BLOCK = 32  # positions of a block in the paged layout
CHUNK = 96  # tokens of the prefill chunk that is checked
TIMED_LAYERS = 8
TIMED_ROWS = 8
TIMED_CONTEXT = 512
REPEATS = 5


@dataclass(frozen=True)
class Proof:
    """What was found for one shape class. `error`: the largest difference; seconds are of one layer."""

    shape: ShapeClass
    is_used: bool
    reason: str
    error: float = 0.0
    kernel_s: float = 0.0
    stock_s: float = 0.0


def prove(
    attention: PagedAttention, shapes: Iterable[ShapeClass], *, is_forced: bool = False, is_paged: bool = False
) -> list[Proof]:
    """Check each class; with `is_forced` only that it runs and gives the right values.

    Args:
        is_paged: in blocks of the paged layout; the stock path that it is timed against is that of the slots.
    """
    return [_prove(attention, shape, is_forced, is_paged) for shape in shapes]


def choose(
    attention: PagedAttention, shapes: Iterable[ShapeClass], *, is_forced: bool = False, is_paged: bool = False
) -> AttentionChoice:
    proofs = prove(attention, shapes, is_forced=is_forced, is_paged=is_paged)
    return AttentionChoice(attention, {proof.shape: proof.is_used for proof in proofs}, tuple(p.reason for p in proofs))


def _prove(attention: PagedAttention, shape: ShapeClass, is_forced: bool, is_paged: bool) -> Proof:
    try:
        error = largest_error(attention, shape, is_paged=is_paged)
        if error <= TOLERANCE[shape.dtype]:
            error = cache_error(attention, shape, is_paged=is_paged)
        if not error <= TOLERANCE[shape.dtype]:  # NaN fails, too
            return Proof(shape, False, f"{shape.name}: stock, the kernel is off by {error:.3g}", error)
        if is_forced:
            return Proof(shape, True, f"{shape.name}: kernel, as asked for", error)
        kernel_s, stock_s = seconds(attention, shape, is_paged=is_paged), seconds(None, shape)
    except (RuntimeError, ValueError) as failure:  # does not compile or launch here
        return Proof(shape, False, f"{shape.name}: stock, the kernel fails: {str(failure)[:200]}")
    times = f"{kernel_s * 1e6:.0f} us a layer against {stock_s * 1e6:.0f}"
    is_used = kernel_s < stock_s * (CHUNK_SHARE if shape.rows == 0 else 1.0)
    return Proof(shape, is_used, f"{shape.name}: {'kernel' if is_used else 'stock'}, {times}", error, kernel_s, stock_s)


# ------------------------------------------------ values


@dataclass(frozen=True)
class Case:
    """Rows to attend or to append, and a pool for them."""

    pages: Pages
    num_blocks: int
    block_size: int
    variant: Variant
    old: int = 0  # of a prefill chunk


def largest_error(attention: PagedAttention, shape: ShapeClass, *, is_paged: bool = False) -> float:
    """Against the reference, which runs on the CPU: there stock operations need no compilation.

    Outputs and whole pools are compared.
    """
    worst = 0.0
    for case in cases(shape, is_paged=is_paged):
        error = _error(attention, shape, case)
        if not error <= worst:  # NaN stays
            worst = error
    return worst


def cases(shape: ShapeClass, *, is_paged: bool) -> list[Case]:
    """Ragged rows; rows that are split over the key axis; a ring that wraps, with a window, soft-cap and sinks.

    Of prefill chunks: from the start, in the middle of one sequence, and of two.
    """
    with mx.stream(mx.cpu):
        if shape.rows == 0:
            none = Variant(1.0)
            made = [
                _case([2], [0], 4, 256, none, is_paged=is_paged),
                _case([1], [101], 4, 256, none, is_paged=is_paged, old=101),
                _case([3, 0], [40, 40], 4, 256, none, is_paged=is_paged, old=40),
            ]
        else:
            plain = Variant(shape.dim**-0.5)
            sinks = mx.random.normal((shape.num_heads,), key=mx.random.key(9))
            ring = Variant(0.1, window=100, softcap=20.0, sinks=sinks)
            made = [
                _case([3, 1, 0, 5], [0, 1, 37, 200], 6, 250, plain, is_paged=is_paged),
                _case([1, 0, 2], [1500, 5, 640], 3, 1600, plain, is_paged=is_paged),
                _case([0, 2, 1], [10, 700, 131], 3, 192, ring, is_paged=is_paged),
            ]
            mx.eval(sinks)
        mx.eval([case.pages.table for case in made], [case.pages.starts for case in made])
        return made


def _case(
    rows: list[int], starts: list[int], num_rows: int, capacity: int, variant: Variant, *, is_paged: bool, old: int = 0
) -> Case:
    """Rows of a pool of slots, or in blocks that lie anywhere in one."""
    if not is_paged:
        return Case(slot_pages(rows, starts), num_rows, capacity, variant, old)
    width = -(-capacity // PROVED_BLOCK)
    places = 1 + mx.random.permutation(num_rows * width, key=mx.random.key(3)).astype(mx.int32)
    table = mx.contiguous(places.reshape(num_rows, width)[mx.array(rows)])  # kernels read it by its pointer
    pages = Pages(table, mx.array(starts, dtype=mx.int32), tuple(starts), PROVED_BLOCK.bit_length() - 1)
    return Case(pages, num_rows * width + 1, PROVED_BLOCK, variant, old)


def cache_error(attention: PagedAttention, shape: ShapeClass, *, is_paged: bool = False) -> float:
    """Against stock operations over slots, each the whole way through its caches: what a layer puts out for rows in
    the middle of three sequences, pools and tables as a forward makes them included.
    """
    width = shape.rows or CHUNK
    starts = [CHECKED - width - n for n in (0, 7, 70)] if shape.rows else [CHECKED - width] * 3
    spec, slots = AttentionSpec(shape.num_kv_heads, shape.dim, shape.dim), list(range(3))
    q, k, v = _random(shape, 3, CHECKED)
    mx.eval(q, k, v)
    rope = Rope(rope_of(shape.dim))
    outs = []
    for by_kernel in (True, False):
        make = PagedStore if by_kernel and is_paged else CacheStore
        store = make([spec], [CHECKED_CAPACITY], CHECKED, shape.dtype, is_exact=False, slack=64)
        if by_kernel:
            store.use_attention(AttentionChoice(attention, {shape: True}))
        for slot in slots:
            store.ensure(slot, CHECKED_CAPACITY)
        batch = store.open(slots, [0] * 3, CHECKED)
        order = mx.array(batch.order)
        batch.view_of(store.kv_layers[0]).write(k[order], v[order])
        batch = store.open(slots, starts, width)
        order = mx.array(batch.order)
        rows = [x[order][:, :, :width] for x in (q, k, v)]
        rotate: Rotate = rope.at(batch.layers[0].offset, width, 3, is_cpu=False)
        out = _layer_rows(shape, *rows)(batch.layers[0], rotate)  # type: ignore[arg-type] # a KVView
        if shape.form != "apart" and out.ndim == 4:
            out = out.swapaxes(1, 2).reshape(3, width, -1)
        outs.append(out[mx.argsort(order)])
        mx.eval(outs, store.writes())
    return _difference(outs[0], outs[1])


def tiles_are_right(attention: PagedAttention, shapes: Iterable[ShapeClass], *, is_paged: bool = False) -> bool:
    """Do prefill rows in tiles give what they give at once? `shapes` as they are used. False, with the reason logged.

    Also compiles what tiles take, so that no request waits for it.
    """
    for shape in shapes:
        if shape.rows != MAX_ROWS or shape.is_shared:
            continue
        try:
            error = max(_tiles_error(attention, shape, case) for case in tile_cases(shape.dim, is_paged=is_paged))
        except (RuntimeError, ValueError) as failure:
            logger.warning("tiles of prefill chunks, %s: they fail: %s", shape.name, str(failure)[:200])
            return False
        if not error <= TOLERANCE[shape.dtype]:
            logger.warning("tiles of prefill chunks, %s: off by %.3g", shape.name, error)
            return False
    return True


def tile_cases(dim: int, *, is_paged: bool = False) -> list[Case]:
    """Rows in the middle of their sequences; one long enough for the key axis to be split; a ring that wraps."""
    plain = Variant(dim**-0.5)
    with mx.stream(mx.cpu):
        made = [
            _case([2, 0], [37, 70], 3, 250, plain, is_paged=is_paged),
            _case([1], [1500], 2, 1600, plain, is_paged=is_paged),
            _case([0, 1], [170, 10], 2, 192, Variant(0.1, window=100, softcap=20.0), is_paged=is_paged),
        ]
        mx.eval([case.pages.table for case in made], [case.pages.starts for case in made])
        return made


def _tiles_error(attention: PagedAttention, shape: ShapeClass, case: Case) -> float:
    count = 3
    with mx.stream(mx.cpu):
        q, k, v = _random(shape, case.pages.num_rows, count * MAX_ROWS)
        cut = tiles(case.pages, MAX_ROWS, count)
        pools = [_pool(shape, case) for _ in "ab"]
        mx.eval(q, k, v, cut.table, cut.starts)
    variant = case.variant
    if shape.form == "apart":
        got = [attend_in_tiles(attention, (q, k, v), pools[0], case.pages, cut, variant)]
    else:
        with mx.stream(mx.cpu):
            qkv, rotation = joined(q, k, v), Rope(rope_of(shape.dim)).at(case.pages.starts, 1, 1, is_cpu=False)
            assert isinstance(rotation, Rotation), "off the CPU a rope gives a Rotation"
            variant = replace(variant, norms=norms_of(shape), rotation=rotation)
        got = [attend_joined_in_tiles(attention, qkv, shape.num_heads, pools[0], case.pages, cut, variant)]
    mx.eval(got)
    with mx.stream(mx.cpu):
        if shape.form == "apart":
            wanted = [ReferenceAttention().attend(q, k, v, pools[1], case.pages, variant)]
        else:
            wanted = [ReferenceAttention().attend_joined(qkv, shape.num_heads, pools[1], case.pages, variant)]
    pools[0].settle()
    mx.synchronize()
    got += [pools[0].keys, pools[0].values]
    wanted += [pools[1].keys, pools[1].values]
    return max(_difference(a, b) for a, b in zip(got, wanted, strict=True))


def compile_kernels(attention: PagedAttention, shapes: Iterable[ShapeClass], *, is_paged: bool = False) -> None:
    """Run each shape class once, so that its kernels are compiled now and not while a request waits.

    Raises:
        RuntimeError, ValueError: one does not compile or launch here.
    """
    for shape in shapes:
        for case in cases(shape, is_paged=is_paged):
            tensors, pool = _inputs(shape, case)
            mx.eval(_run(attention, shape, case, tensors, pool))


def _inputs(shape: ShapeClass, case: Case) -> tuple[list[mx.array], Pool]:
    with mx.stream(mx.cpu):
        tensors = _random(shape, case.pages.num_rows, shape.rows or CHUNK)
        mx.eval(tensors)
        return tensors, _pool(shape, case)


def _run(
    attention: PagedAttention, shape: ShapeClass, case: Case, tensors: list[mx.array], pool: Pool
) -> list[mx.array]:
    q, k, v = tensors
    if shape.rows == 0:
        return list(attention.append(k, v, pool, case.pages, case.old))
    with mx.stream(mx.cpu):
        rotation = Rope(rope_of(shape.dim)).at(case.pages.starts, shape.rows, case.pages.num_rows, is_cpu=False)
    assert isinstance(rotation, Rotation), "off the CPU a rope gives a Rotation"
    variant = replace(case.variant, rotation=rotation)
    if shape.form != "apart":
        with mx.stream(mx.cpu):
            qkv, norms = joined(q, k, v), norms_of(shape)
        return [attention.attend_joined(qkv, shape.num_heads, pool, case.pages, replace(variant, norms=norms))]
    out = [attention.attend(q, k, v, pool, case.pages, variant)]
    if shape.is_shared:  # as in a model: reads what was just written, before the next step writes there
        out.append(attention.attend_written(-q, pool, case.pages, variant))
        out.append(attention.attend(q, v, k, pool, case.pages, variant))
    return out


def _error(attention: PagedAttention, shape: ShapeClass, case: Case) -> float:
    tensors, pool = _inputs(shape, case)
    pools = [pool, _pool(shape, case)]
    got = _run(attention, shape, case, tensors, pools[0])
    mx.eval(got)
    with mx.stream(mx.cpu):
        wanted = _run(ReferenceAttention(), shape, case, tensors, pools[1])
    pools[0].settle()
    mx.synchronize()
    got += [pools[0].keys, pools[0].values]
    wanted += [pools[1].keys, pools[1].values]
    return max(_difference(a, b) for a, b in zip(got, wanted, strict=True))


def _difference(a: mx.array, b: mx.array) -> float:
    with mx.stream(mx.cpu):
        return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def joined(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """As one product would have them, (B, R, (heads + 2 * kv_heads) * dim)."""
    rows = mx.concatenate([x.swapaxes(1, 2) for x in (q, k, v)], axis=2)
    rows = rows.reshape(*rows.shape[:2], -1)
    mx.eval(rows)
    return rows


def norms_of(shape: ShapeClass) -> HeadNorms | None:
    """Random ones, where the shape class has some."""
    if shape.form != "normed":
        return None
    q, k = (1 + 0.1 * mx.random.normal((shape.dim,), key=mx.random.key(i)) for i in (5, 6))
    norms = HeadNorms(q.astype(shape.dtype), k.astype(shape.dtype), 1e-6)
    mx.eval(norms.q, norms.k)
    return norms


def rope_of(dim: int) -> RopeParameters:
    return RopeParameters(tuple(10000.0 ** (-i / dim) for i in range(0, dim, 2)))


def _random(shape: ShapeClass, batch: int, rows: int) -> list[mx.array]:
    """q, k, v as a model makes them: (B, L, heads, dim), seen as (B, heads, L, dim)."""
    keys = mx.random.split(mx.random.key(rows), 3)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return [
        mx.random.normal((batch, rows, n, shape.dim), key=key).astype(shape.dtype).swapaxes(1, 2)
        for n, key in zip(heads, keys, strict=True)
    ]


def _pool(shape: ShapeClass, case: Case) -> Pool:
    size = (case.num_blocks, shape.num_kv_heads, case.block_size, shape.dim)
    arrays = [mx.random.normal(size, key=mx.random.key(i)).astype(shape.dtype) for i in (1, 2)]
    mx.eval(arrays)
    return Pool(*arrays)


# ------------------------------------------------ time


def seconds(
    attention: PagedAttention | None,
    shape: ShapeClass,
    rows: int = TIMED_ROWS,
    context: int = TIMED_CONTEXT,
    *,
    is_paged: bool = False,
) -> float:
    """One layer of a forward through the cache, None: by the stock path.

    Rotation and write are included; layers that share another's keys write none.
    """
    width = shape.rows or CHUNK
    rows = rows if shape.rows else 1
    spec = AttentionSpec(shape.num_kv_heads, shape.dim, shape.dim)
    make = PagedStore if is_paged else CacheStore
    store = make([spec] * TIMED_LAYERS, [context + 64], max(width, context), shape.dtype, is_exact=False, slack=64)
    if attention is not None:
        store.use_attention(AttentionChoice(attention, {shape: True}))
    for slot in range(rows):
        store.ensure(slot, context + 64)
    store.open(list(range(rows)), [0] * rows, context)  # blocks for all that is attended to
    rope = Rope(rope_of(shape.dim))
    q, k, v = _random(shape, rows, width)
    mx.eval(q, k, v, store.pending())
    rows_of = _layer_rows(shape, q, k, v)
    starts = [context - 7 * i for i in range(rows)] if shape.rows else [0]
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        for _ in "ab":  # the second is queued while the first runs, as steps are
            start_evaluating([*_forward(store, shape, rows_of, starts, rope), *store.writes()])
        mx.synchronize()
        times.append((time.perf_counter() - began) / 2 / TIMED_LAYERS)
    return min(times)


Attend = Callable[[KVView, Rotate], mx.array]


def _layer_rows(shape: ShapeClass, q: mx.array, k: mx.array, v: mx.array) -> Attend:
    """What one layer asks of its cache. By the stock path joined rows are taken apart, as a model would take them."""
    scale = shape.dim**-0.5
    if shape.form == "apart":
        keys, values = (None, None) if shape.is_shared else (k, v)
        return lambda view, rotate: view.attend(q, keys, values, scale, rotation=rotate)
    qkv, norms = joined(q, k, v), norms_of(shape)

    def attend(view: KVView, rotate: Rotate) -> mx.array:
        out = view.attend_joined(qkv, shape.num_heads, scale, rotation=rotate, norms=norms)
        if out is None:
            parts = apart(qkv, shape.num_heads, shape.num_kv_heads, norms)
            out = view.attend(parts[0], parts[1], parts[2], scale, rotation=rotate)
        return out

    return attend


def _forward(store: CacheStore, shape: ShapeClass, attend: Attend, starts: list[int], rope: Rope) -> list[mx.array]:
    """Each layer's output: layers of their own pools, one behind the other on the device."""
    width = shape.rows or CHUNK
    batch = store.open(list(range(len(starts))), starts, width)
    rotate: Rotate = rope.at(batch.layers[0].offset, width, len(starts), is_cpu=False)
    return [attend(view, rotate) for view in batch.layers]  # type: ignore[arg-type] # all are KVViews
