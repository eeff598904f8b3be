"""Decode and verify attention: kernel against stock operations against copy bandwidth.

`python -m bench.attention --shape 8b --rows 1,8 --batches 1,8,32 --contexts 1024,8192`

"kernel" is one of 256 launches behind each other, on up to 32 pools in turn, rotation and write of the new rows
included; rows come as one product's, as a model's layers give them; keys and values lie in slots, or in blocks of 32
positions anywhere in the pool (`--layout paged`). "copy" is a device copy in such a chain that reads
and writes as many bytes, half each, as the layer's keys and values have; "ideal" what those bytes take at the rate of a
copy of gigabytes. "stock" is one layer through the slots' cache by MLX's own operations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench.report import finish, provenance, table
from workers.arrays import start_evaluating
from workers.kernels.base import PagedAttention, Variant
from workers.kernels.choice import ShapeClass
from workers.kernels.cuda import CudaAttention, supports
from workers.kernels.pages import Pages, Pool, slot_pages
from workers.kernels.prove import largest_error, rope_of, seconds
from workers.models.rope import Rope, Rotation

HEADS = {"8b": (32, 8, 128), "small": (9, 3, 64), "4b": (32, 8, 80), "gemma": (8, 4, 256)}


BLOCK = 32  # positions of a block in the paged layout
LAUNCHES = 256
MAX_POOLS = 32
COPIES = 64
MOST_BYTES = 8 << 30  # that are copied in turn
LARGE = 2 << 30
REPEATS = 6


def best_of(build: Callable[[], list[mx.array]]) -> float:
    """Seconds of building operations, handing them over and waiting, by operation."""
    best = float("inf")
    for _ in range(REPEATS):
        mx.synchronize()
        started = time.perf_counter()
        arrays = build()
        start_evaluating(arrays)
        mx.synchronize()
        best = min(best, (time.perf_counter() - started) / len(arrays))
    return best


def kernel_seconds(
    attention: PagedAttention, shape: ShapeClass, batch: int, context: int, num_pools: int, *, is_paged: bool = False
) -> float:
    """One launch over `batch` sequences of about `context` tokens."""
    starts = [context - 7 * (i % 8) for i in range(batch)]
    if is_paged:
        width = (context + 64) // BLOCK
        places = mx.random.permutation(batch * width).astype(mx.int32).reshape(batch, width)
        pages = Pages(places, mx.array(starts, dtype=mx.int32), tuple(starts), BLOCK.bit_length() - 1)
        size = (batch * width, shape.num_kv_heads, BLOCK, shape.dim)
    else:
        pages = slot_pages(range(batch), starts)
        size = (batch, shape.num_kv_heads, context + 64, shape.dim)
    pools = []
    for _ in range(num_pools):
        keys, values = (mx.random.normal(size).astype(shape.dtype) for _ in "kv")
        mx.eval(keys, values)
        pools.append(Pool(keys, values))
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.dim
    qkv = mx.random.normal((batch, shape.rows, width)).astype(shape.dtype)
    mx.eval(qkv, pages.table, pages.starts)
    rotation = Rope(rope_of(shape.dim)).at(pages.starts, shape.rows, batch, is_cpu=False)
    assert isinstance(rotation, Rotation), "off the CPU a rope gives a Rotation"
    variant = Variant(shape.dim**-0.5, rotation=rotation)

    def launches() -> list[mx.array]:
        turns = (pools[i % num_pools] for i in range(LAUNCHES))
        return [attention.attend_joined(qkv, shape.num_heads, pool, pages, variant) for pool in turns]

    return best_of(launches)


def copy_seconds(num_bytes: int) -> float:
    """A device copy that reads half as many bytes and writes them."""
    size = num_bytes // 4  # of 16-bit numbers
    sources = [mx.zeros((size,), mx.bfloat16) for _ in range(max(1, min(16, MOST_BYTES // num_bytes)))]
    mx.eval(sources)
    return best_of(lambda: [sources[i % len(sources)] + 0 for i in range(min(COPIES, 4 * len(sources)))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--shape", choices=sorted(HEADS), default="8b")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", default="1,8", help="query rows a sequence")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--contexts", default="1024,8192")
    parser.add_argument("--layout", choices=("slots", "paged"), default="slots")
    parser.add_argument("--no-stock", action="store_true", help="the kernel only")
    parser.add_argument("--max-gib", type=float, default=24.0, help="leave out what needs more memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    heads, kv_heads, dim = HEADS[options.shape]
    dtype = getattr(mx, options.dtype)
    bandwidth = LARGE / copy_seconds(LARGE)
    attention = CudaAttention()
    results: list[dict[str, Any]] = []
    for rows in map(int, options.rows.split(",")):
        shape = ShapeClass(heads, kv_heads, dim, rows, dtype, form="joined")
        if not supports(heads, kv_heads, dim, dtype.size, rows):
            continue
        is_paged = options.layout == "paged"
        error = largest_error(attention, shape, is_paged=is_paged)
        for batch in map(int, options.batches.split(",")):
            for context in map(int, options.contexts.split(",")):
                read = batch * context * kv_heads * dim * 2 * dtype.size
                num_pools = min(MAX_POOLS, int(options.max_gib * 2**30) // read)
                if num_pools < 2:  # one alone might stay in the device's cache
                    continue
                kernel_s = kernel_seconds(attention, shape, batch, context, num_pools, is_paged=is_paged)
                stock_s = None if options.no_stock else seconds(None, shape, batch, context)
                mx.clear_cache()
                copy_s = copy_seconds(read)
                row = {
                    "rows": rows, "batch": batch, "context": context, "error": error, "kernel_us": kernel_s * 1e6,
                    "stock_us": None if stock_s is None else stock_s * 1e6, "copy_us": copy_s * 1e6,
                    "share_of_copy": copy_s / kernel_s, "ideal_us": read / bandwidth * 1e6,
                    "share_of_ideal": read / bandwidth / kernel_s,
                }  # fmt: skip
                results.append(row)
                print({k: v if v is None else round(v, 3) for k, v in row.items()}, file=sys.stderr, flush=True)
                mx.clear_cache()
    names = ["rows", "batch", "context", "kernel_us", "stock_us", "copy_us", "share_of_copy", "share_of_ideal"]
    print(table(names, [["-" if r[n] is None else f"{r[n]:.3g}" for n in names] for r in results]))
    result = {
        **provenance("attention"), "shape": options.shape, "layout": options.layout, "dtype": options.dtype,
        "copy_bytes_per_s": bandwidth, "rows": results,
    }  # fmt: skip
    finish(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
