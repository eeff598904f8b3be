"""The kernels on CUDA: `mx.fast.cuda_kernel` around attention.cuh, one launch a layer.

The pools are written in place through the inputs' pointers. MLX has no operation for that: its own updates copy a pool
whenever an earlier step that reads it is still on the device, since that step holds a reference. What keeps it safe:
the pools belong to nobody else, `Pool.last` orders the kernels, and steps are queued on one stream. The parts of a key
axis meet in one buffer for all layers, since a layer's kernel ends before the next one's begins.

What a small batch waits for is the host: 28 us for eight rows of 1,024 tokens through two kernels with eight template
arguments, of which MLX makes text at each call (H200, MLX 0.32.4; `bench.host_costs`). So a kernel's numbers are
written into its text, once, and what a launch needs is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from workers.kernels.base import HEAD_DIMS, MAX_GROUP, MAX_ROWS, Variant
from workers.kernels.pages import Pages, Pool
from workers.kernels.params import number, params_of
from workers.kernels.sources import include

NUM_WARPS = 4
SPLIT_TOKENS = 256  # keys that are worth a thread block of their own
# What an SM holds at once. 256 blocks in one wave take 97 us (H100, 32 rows of 1,024 tokens, 8 heads of 128), 512: 132.
BLOCKS_PER_SM = 2
MAX_SPLITS = 64
SHARED_BYTES = 48 << 10

COUNTERS = 1024  # as in attention.cuh
MOST_PARTIAL = max(32 * (128 + 2), 16 * (max(HEAD_DIMS) + 2))  # floats of a thread block: `num_tiles` times 16 queries
CUDA_NAMES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}

POOLS = ["pool_k", "pool_v", "table", "starts", "params"]
LAST = ["inv_freq", "sinks", "scratch", "after"]
NORMS = ["q_norm", "k_norm"]
# What a kernel gets its queries, keys and values in. The rows of `qkv` (B, R, (H + 2 KV) * D) are those of one product.
# `attend_written` has no keys and values of its own: q stands in their places, and is not read as them.
TENSORS = {
    "attend": ["q", "k", "v"],
    "attend_written": ["q"],
    "attend_joined": ["qkv"],
}
ARGUMENTS = {
    "attend": "q, q_strides, k, k_strides, v, v_strides",
    "attend_written": "q, q_strides, q, q_strides, q, q_strides",
    "attend_joined": "qkv, at, qkv + G * KV * D, at, qkv + (G + 1) * KV * D, at",
}
PRELUDES = {
    "attend": "const int R = q_shape[2], KV = k_shape[1];",
    "attend_written": "const int R = q_shape[2], KV = pool_k_shape[1];",
    "attend_joined": """const int R = qkv_shape[1], KV = pool_k_shape[1];
const long width = long(G + 2) * KV * D;
Strides at{};
at[0] = R * width, at[1] = D, at[2] = width, at[3] = 1;""",
}

Kernel = Callable[..., list[mx.array]]


def header() -> str:
    return include("attention.cuh")


def constants_text(dtype: str, constants: dict[str, int]) -> str:
    return "".join([f"using T = {dtype};\n", *(f"constexpr int {name} = {n};\n" for name, n in constants.items())])


def attend_kernel(kind: str, *, has_norms: bool) -> tuple[list[str], list[str], str]:
    """Inputs, outputs and body of a kernel that attends; `kind` is one of TENSORS."""
    flags = ["false", "true"]
    is_shared = kind == "attend_written"
    body = f"""{PRELUDES[kind]}
tandem::Attend<T, D, G, MT, NEW, ROPE, SHIFT, NW, {flags[is_shared]}, {flags[has_norms]}>::run(
    {ARGUMENTS[kind]}, pool_k, pool_v, table, starts, params, inv_freq, sinks,
    {"q_norm, k_norm" if has_norms else "(const T*)nullptr, (const T*)nullptr"}, R, KV, out,
    const_cast<float*>(scratch));"""
    return [*TENSORS[kind], *POOLS, *LAST, *(NORMS if has_norms else ())], ["out"], body


def append_kernel(*, gives_back: bool) -> tuple[list[str], list[str], str]:
    """Inputs, outputs and body of a kernel that writes a prefill chunk; `gives_back`: and gathers what is before."""
    inputs = ["k", "v", *POOLS, "after"]
    arguments = "k, k_strides, v, v_strides, pool_k, pool_v, table, starts, params, k_shape[0], k_shape[1], k_shape[2]"
    if gives_back:
        body = f"tandem::write_rows<T, D, SHIFT, true>({arguments}, old[0], keys, values);"
        return [*inputs, "old"], ["keys", "values"], body
    body = (
        f"tandem::write_rows<T, D, SHIFT, false>({arguments}, 0, nullptr, nullptr);\n"
        "if (blockIdx.x == 0 && threadIdx.x == 0) token[0] = tandem::from_float<T>(0.f);"
    )
    return inputs, ["token"], body


def append_joined_kernel(*, has_norms: bool) -> tuple[list[str], list[str], str]:
    """Inputs, outputs and body of a kernel that writes keys and values of one product's rows, of any number."""
    inputs = ["qkv", *POOLS, "inv_freq", "after", *(["k_norm"] if has_norms else [])]
    body = f"""tandem::Attend<T, D, G, 1, 1, ROPE, SHIFT, NW, false, {["false", "true"][has_norms]}>::append(
    qkv, pool_k, pool_v, table, starts, params, inv_freq, {"k_norm" if has_norms else "nullptr"},
    qkv_shape[0], qkv_shape[1], pool_k_shape[1]);
if (blockIdx.x == 0 && threadIdx.x == 0) token[0] = tandem::from_float<T>(0.f);"""
    return inputs, ["token"], body


@dataclass(frozen=True)
class Launch:
    """What forwards of one shape have in common.

    Args:
        num_blocks: thread blocks where the key axis is not split.
    """

    kernel: Kernel
    num_blocks: int
    grid: tuple[int, int]
    threadgroup: tuple[int, int, int]
    shapes: list[tuple[int, ...]]
    dtypes: list[mx.Dtype]


class CudaAttention:
    """`PagedAttention` on the GPU.

    Args:
        num_sms: streaming multiprocessors to fill.
    """

    def __init__(self, num_sms: int = 132, num_warps: int = NUM_WARPS) -> None:
        self._num_sms, self._num_warps = num_sms, num_warps
        self._none = mx.zeros((1,), mx.float32)
        # Where the parts of a key axis meet, see attention.cuh: room for all thread blocks that are ever split. It is
        # there before the first launch: of a lazy one each launch that is queued meanwhile would fill its own.
        self._scratch = mx.zeros((COUNTERS + BLOCKS_PER_SM * num_sms * MOST_PARTIAL,), mx.float32)
        mx.eval(self._scratch)
        self._started: dict[mx.Dtype, mx.array] = {}
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._launches: dict[tuple[object, ...], Launch] = {}

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        batch, heads, rows, dim = q.shape
        out = self._attend("attend", [q, k, v], (batch, rows, heads, dim), q.dtype, pool, pages, variant)
        return out.swapaxes(1, 2)

    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        batch, heads, rows, dim = q.shape
        out = self._attend("attend_written", [q], (batch, rows, heads, dim), q.dtype, pool, pages, variant)
        return out.swapaxes(1, 2)

    def attend_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        batch, rows, width = qkv.shape
        shape = (batch, rows, num_heads, width // (num_heads + 2 * pool.num_kv_heads))
        return self._attend("attend_joined", [qkv], shape, qkv.dtype, pool, pages, variant)

    def _attend(
        self,
        kind: str,
        tensors: list[mx.array],
        shape: tuple[int, int, int, int],
        dtype: mx.Dtype,
        pool: Pool,
        pages: Pages,
        variant: Variant,
    ) -> mx.array:
        """Args:
            tensors: as `TENSORS` names them.
            shape: (B, R, H, D) of the queries.
        Returns:
            (B, R, H, D), of `attend_joined` (B, R, H * D).
        """
        rotation, norms = variant.rotation, variant.norms
        rope = 0 if rotation is None else rotation.dim
        key = (kind, shape, dtype, pool.num_kv_heads, rope, pages.shift, norms is not None)
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._launch(*key)
        none = self._none
        inputs = [
            *tensors, pool.keys, pool.values, pages.table, pages.starts, params_of(variant, pool, pages),
            none if rotation is None else rotation.inv_freq, none if variant.sinks is None else variant.sinks,
            self._scratch, self._after(pool, dtype),
        ]  # fmt: skip
        if norms is not None:
            inputs += [norms.q, norms.k]
        splits = self.num_splits(launch.num_blocks, pages.longest, variant.window)
        (out,) = launch.kernel(
            inputs=inputs, output_shapes=launch.shapes, output_dtypes=launch.dtypes, grid=(*launch.grid, splits),
            threadgroup=launch.threadgroup,
        )  # fmt: skip
        pool.last = out
        return out

    def _launch(
        self,
        kind: str,
        shape: tuple[int, int, int, int],
        dtype: mx.Dtype,
        kv_heads: int,
        rope: int,
        shift: int,
        has_norms: bool,
    ) -> Launch:
        batch, rows, heads, dim = shape
        group = heads // kv_heads
        most_new = 1 if kind == "attend_written" else max_rows(dim, dtype.size)
        constants = {
            "D": dim, "G": group, "MT": num_tiles(group * rows, dim, dtype.size), "NEW": most_new, "ROPE": rope,
            "SHIFT": shift, "NW": self._num_warps,
        }  # fmt: skip
        parts = num_parts(group * rows, dim, dtype.size)
        threads = 32 * self._num_warps
        return Launch(
            self._kernel(kind, attend_kernel(kind, has_norms=has_norms), dtype, constants),
            num_blocks=batch * kv_heads * parts,
            grid=(kv_heads * parts * threads, batch),
            threadgroup=(threads, 1, 1),
            shapes=[(batch, rows, heads * dim) if kind == "attend_joined" else shape],
            dtypes=[dtype],
        )

    def _kernel(
        self, name: str, parts: tuple[list[str], list[str], str], dtype: mx.Dtype, constants: dict[str, int]
    ) -> Kernel:
        """Compiled at its first launch."""
        inputs, outputs, body = parts
        key = (name, tuple(inputs), dtype, *constants.values())
        if key not in self._kernels:
            made: Any = mx.fast.cuda_kernel(
                name="_".join(["tandem", name, *(str(n) for n in constants.values())]),
                input_names=inputs,
                output_names=outputs,
                source=constants_text(CUDA_NAMES[dtype], constants) + body,
                header=header(),
                ensure_row_contiguous=False,
            )
            self._kernels[key] = made
        return self._kernels[key]

    def append(self, k: mx.array, v: mx.array, pool: Pool, pages: Pages, old: int) -> tuple[mx.array, mx.array]:
        batch, kv_heads, length, dim = k.shape
        params = params_of(Variant(1.0), pool, pages)
        inputs = [k, v, pool.keys, pool.values, pages.table, pages.starts, params, self._after(pool, k.dtype)]
        name = "append_after" if old else "append"
        kernel = self._kernel(name, append_kernel(gives_back=old > 0), k.dtype, {"D": dim, "SHIFT": pages.shift})
        threads = batch * kv_heads * (old + length) * (dim * k.dtype.size // 16)
        launch = {"grid": (-(-threads // 256) * 256, 1, 1), "threadgroup": (256, 1, 1)}
        if old == 0:
            (token,) = kernel(inputs=inputs, output_shapes=[(1,)], output_dtypes=[k.dtype], **launch)
            pool.last = token
            # Whoever attends to k thereby asks for the write, too.
            (k,) = mx.depends([k], [token])
            return k, v
        shape = (batch, kv_heads, old + length, dim)
        keys, values = kernel(
            inputs=[*inputs, number(old)], output_shapes=[shape, shape], output_dtypes=[k.dtype, k.dtype], **launch
        )
        pool.last = keys
        return keys, values

    def append_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> None:
        batch, length, width = qkv.shape
        kv_heads, rotation, norms = pool.num_kv_heads, variant.rotation, variant.norms
        constants = {
            "D": width // (num_heads + 2 * kv_heads), "G": num_heads // kv_heads,
            "ROPE": 0 if rotation is None else rotation.dim, "SHIFT": pages.shift, "NW": self._num_warps,
        }  # fmt: skip
        parts = append_joined_kernel(has_norms=norms is not None)
        kernel = self._kernel("append_joined", parts, qkv.dtype, constants)
        threads = 32 * self._num_warps
        (pool.last,) = kernel(
            inputs=[
                qkv, pool.keys, pool.values, pages.table, pages.starts, params_of(variant, pool, pages),
                self._none if rotation is None else rotation.inv_freq, self._after(pool, qkv.dtype),
                *([] if norms is None else [norms.k]),
            ],
            grid=(-(-batch * length * kv_heads // self._num_warps) * threads, 1, 1), threadgroup=(threads, 1, 1),
            output_shapes=[(1,)], output_dtypes=[qkv.dtype],
        )  # fmt: skip

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
    padded_query = ((dim + 31) // 64 * 64 + 32) * itemsize if itemsize == 2 else padded
    return queries * padded_query + max(new, queries * (dim + 1) * 4) + 2 * num_warps * queries * 4 + 16


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
