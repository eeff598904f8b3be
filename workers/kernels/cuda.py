"""The kernels on CUDA: `mx.fast.cuda_kernel` around attention.cuh, one launch a layer where the key axis is not split.

The pools are written in place through the inputs' pointers. MLX has no operation for that: its own updates copy a pool
whenever an earlier step that reads it is still on the device, since that step holds a reference. What keeps it safe:
the pools belong to nobody else, `Pool.last` orders the kernels, and steps are queued on one stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from workers.kernels.base import HEAD_DIMS, MAX_GROUP, MAX_ROWS, Variant
from workers.kernels.pages import Pages, Pool
from workers.kernels.params import number, params_of

NUM_WARPS = 4
SPLIT_TOKENS = 256  # keys that are worth a thread block of their own
# What an SM holds at once. 256 blocks in one wave take 97 us (H100, 32 rows of 1,024 tokens, 8 heads of 128), 512: 132.
BLOCKS_PER_SM = 2
MAX_SPLITS = 64
SHARED_BYTES = 48 << 10

INPUTS = ["q", "k", "v", "pool_k", "pool_v", "table", "starts", "params", "inv_freq", "sinks", "after"]
ATTEND = """tandem::Attend<T, D, G, MT, NEW, ROPE, SHIFT, SPLIT, NW>::run(q, q_strides, k, k_strides, v, v_strides,
    pool_k, pool_v, table, starts, params, inv_freq, sinks, q_shape[2], k_shape[1], out, STATS);"""
SHARED_INPUTS = ["q", "pool_k", "pool_v", "table", "starts", "params", "inv_freq", "sinks", "after"]
# No keys and values of its own: q stands in their places, and is not read as them.
ATTEND_WRITTEN = """tandem::Attend<T, D, G, MT, NEW, ROPE, SHIFT, SPLIT, NW, true>::run(q, q_strides, q, q_strides,
    q, q_strides, pool_k, pool_v, table, starts, params, inv_freq, sinks, q_shape[2], pool_k_shape[1], out, STATS);"""
COMBINE = """tandem::combine<T, D, G>(partial, stats, params, sinks, stats_shape[1],
    stats_shape[0] * stats_shape[1] * stats_shape[2], stats_shape[2] / G, stats_shape[3], out);"""


def header() -> str:
    """Includes attention.cuh by its path: MLX copies and hashes a kernel's text on each launch, 16 KB take it 5 us."""
    return f'#include "{Path(__file__).with_name("attention.cuh")}"\n'


def kernel_bodies() -> dict[str, tuple[list[str], list[str], str]]:
    """Name -> inputs, outputs and body of each kernel."""
    append_inputs = ["k", "v", "pool_k", "pool_v", "table", "starts", "params", "after"]
    arguments = "k, k_strides, v, v_strides, pool_k, pool_v, table, starts, params, k_shape[0], k_shape[1], k_shape[2]"
    return {
        "attend": (INPUTS, ["out"], ATTEND.replace("SPLIT", "false").replace("STATS", "nullptr")),
        "attend_split": (INPUTS, ["out", "stats"], ATTEND.replace("SPLIT", "true").replace("STATS", "stats")),
        "attend_written": (
            SHARED_INPUTS,
            ["out"],
            ATTEND_WRITTEN.replace("SPLIT", "false").replace("STATS", "nullptr"),
        ),
        "attend_written_split": (
            SHARED_INPUTS,
            ["out", "stats"],
            ATTEND_WRITTEN.replace("SPLIT", "true").replace("STATS", "stats"),
        ),
        "combine": (["partial", "stats", "params", "sinks"], ["out"], COMBINE),
        "append": (
            append_inputs,
            ["token"],
            f"tandem::write_rows<T, D, SHIFT, false>({arguments}, 0, nullptr, nullptr);\n"
            "if (blockIdx.x == 0 && threadIdx.x == 0) token[0] = tandem::from_float<T>(0.f);",
        ),
        "append_after": (
            [*append_inputs, "old"],
            ["keys", "values"],
            f"tandem::write_rows<T, D, SHIFT, true>({arguments}, old[0], keys, values);",
        ),
    }


class CudaAttention:
    """`PagedAttention` on the GPU.

    Args:
        num_sms: streaming multiprocessors to fill.
    """

    def __init__(self, num_sms: int = 132, num_warps: int = NUM_WARPS) -> None:
        text = header()
        self._kernels: dict[str, Any] = {
            name: mx.fast.cuda_kernel(
                name=f"tandem_{name}",
                input_names=inputs,
                output_names=outputs,
                source=body,
                header=text,
                ensure_row_contiguous=False,
            )
            for name, (inputs, outputs, body) in kernel_bodies().items()
        }
        self._num_sms, self._num_warps = num_sms, num_warps
        self._none = mx.zeros((1,), mx.float32)
        self._started: dict[mx.Dtype, mx.array] = {}

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        most_new = max_rows(q.shape[-1], q.dtype.size)
        return self._attend("attend", [q, k, v], most_new, pool, pages, variant)

    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return self._attend("attend_written", [q], 1, pool, pages, variant)

    def _attend(
        self, kernel: str, tensors: list[mx.array], most_new: int, pool: Pool, pages: Pages, variant: Variant
    ) -> mx.array:
        """Args:
        tensors: q, then the new keys and values of a kernel that writes some.
        most_new: `Attend::NEW`.
        """
        q = tensors[0]
        batch, heads, rows, dim = q.shape
        kv_heads = pool.keys.shape[1]
        group = heads // kv_heads
        rotation = variant.rotation
        params = params_of(variant, pool, pages)
        sinks = self._none if variant.sinks is None else variant.sinks
        inputs = [
            *tensors, pool.keys, pool.values, pages.table, pages.starts, params,
            self._none if rotation is None else rotation.inv_freq, sinks, self._after(pool, q.dtype),
        ]  # fmt: skip
        template: list[tuple[str, Any]] = [
            ("T", q.dtype), ("D", dim), ("G", group), ("MT", num_tiles(group * rows, dim, q.dtype.size)),
            ("NEW", most_new), ("ROPE", 0 if rotation is None else rotation.dim),
            ("SHIFT", pages.shift), ("NW", self._num_warps),
        ]  # fmt: skip
        parts = num_parts(group * rows, dim, q.dtype.size)
        splits = self.num_splits(batch * kv_heads * parts, max(pages.host_starts), variant.window)
        threads = 32 * self._num_warps
        launch = {"grid": (kv_heads * parts * threads, batch, splits), "threadgroup": (threads, 1, 1)}
        if splits == 1:
            (out,) = self._kernels[kernel](
                inputs=inputs, template=template, output_shapes=[(batch, rows, heads, dim)], output_dtypes=[q.dtype],
                **launch,
            )  # fmt: skip
        else:
            shape = (batch, kv_heads, group * rows, splits)
            partial, stats = self._kernels[f"{kernel}_split"](
                inputs=inputs, template=template, output_shapes=[(*shape, dim), (*shape, 2)],
                output_dtypes=[mx.float32, mx.float32], **launch,
            )  # fmt: skip
            num_rows = batch * heads * rows
            (out,) = self._kernels["combine"](
                inputs=[partial, stats, params, sinks],
                template=[("T", q.dtype), ("D", dim), ("G", group)],
                output_shapes=[(batch, rows, heads, dim)],
                output_dtypes=[q.dtype],
                grid=(-(-num_rows // 4) * 128, 1, 1),
                threadgroup=(128, 1, 1),
            )
        pool.last = out
        attended: mx.array = out.swapaxes(1, 2)
        return attended

    def append(self, k: mx.array, v: mx.array, pool: Pool, pages: Pages, old: int) -> tuple[mx.array, mx.array]:
        batch, kv_heads, length, dim = k.shape
        params = params_of(Variant(1.0), pool, pages)
        inputs = [k, v, pool.keys, pool.values, pages.table, pages.starts, params, self._after(pool, k.dtype)]
        template = [("T", k.dtype), ("D", dim), ("SHIFT", pages.shift)]
        threads = batch * kv_heads * (old + length) * (dim * k.dtype.size // 16)
        launch = {"template": template, "grid": (-(-threads // 256) * 256, 1, 1), "threadgroup": (256, 1, 1)}
        if old == 0:
            (token,) = self._kernels["append"](inputs=inputs, output_shapes=[(1,)], output_dtypes=[k.dtype], **launch)
            pool.last = token
            # Whoever attends to k thereby asks for the write, too.
            (k,) = mx.depends([k], [token])
            return k, v
        shape = (batch, kv_heads, old + length, dim)
        keys, values = self._kernels["append_after"](
            inputs=[*inputs, number(old)], output_shapes=[shape, shape], output_dtypes=[k.dtype, k.dtype], **launch
        )
        pool.last = keys
        return keys, values

    def num_splits(self, num_blocks: int, length: int, window: int | None) -> int:
        """Parts of the key axis: enough thread blocks for the device, none of them for a handful of keys."""
        length = length if window is None else min(length, window)
        return max(1, min(BLOCKS_PER_SM * self._num_sms // num_blocks, length // SPLIT_TOKENS, MAX_SPLITS))

    def _after(self, pool: Pool, dtype: mx.Dtype) -> mx.array:
        if pool.last is not None:
            return pool.last
        if dtype not in self._started:
            self._started[dtype] = mx.zeros((1,), dtype)
        return self._started[dtype]


def num_tiles(num_queries: int, dim: int, itemsize: int) -> int:
    """`Attend::MT`: tiles of 16 queries that a thread block takes."""
    return 2 if itemsize == 2 and num_queries > 16 and dim <= 128 else 1


def num_parts(num_queries: int, dim: int, itemsize: int) -> int:
    """Thread blocks that share a key-value head's queries."""
    return -(-num_queries // (16 * num_tiles(num_queries, dim, itemsize)))


def max_rows(dim: int, itemsize: int) -> int:
    """`Attend::NEW`: most query rows a sequence; their keys and values lie in shared memory."""
    return MAX_ROWS if dim * itemsize <= 512 else MAX_ROWS // 2


def shared_bytes(num_queries: int, dim: int, itemsize: int, num_warps: int = NUM_WARPS) -> int:
    """Size of `Attend::Shared`."""
    queries = 16 * num_tiles(num_queries, dim, itemsize)
    padded = (dim + 16 // itemsize) * itemsize
    new = 2 * max_rows(dim, itemsize) * padded
    return queries * padded + max(new, queries * dim * 4) + 2 * num_warps * queries * 4


def supports(num_heads: int, num_kv_heads: int, dim: int, itemsize: int, rows: int) -> bool:
    """Is there a kernel for a layer of this shape and `rows` query rows a sequence?"""
    group = num_heads // num_kv_heads
    return (
        num_heads % num_kv_heads == 0
        and dim in HEAD_DIMS
        and group <= MAX_GROUP
        and rows <= max_rows(dim, itemsize)
        and shared_bytes(group * rows, dim, itemsize) <= SHARED_BYTES
    )
