"""silu(gate) * up over rows that one product made of both, on CUDA (gate.cuh).

Stock operations take the two halves as views, a number a thread: 17 us for 256 rows of twice 14,336 numbers and 78 for
2,048, where the kernel takes 12 and 54 (H200, MLX 0.32.4); 64 rows are a launch, 10 and 9.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from workers.kernels.cuda import CUDA_NAMES, constants_text
from workers.kernels.sources import include

logger = logging.getLogger("target")

THREADS = 256
VECTOR_BYTES = 16
MIN_SIZE = 1 << 20  # numbers of both halves: what is smaller waits for the host, not for the device
MAX_SIZE = 1 << 32  # the kernel counts in 32 bits
INPUTS, OUTPUTS = ["joined"], ["out"]
BODY = f"""constexpr int N = {VECTOR_BYTES} / sizeof(T);
tandem_gate::silu<T>(joined, unsigned(joined_shape[0] * joined_shape[1]), unsigned(joined_shape[2] / 2 / N), out);"""
TOLERANCE = 0.02  # of bfloat16 that is rounded three times

Stock = Callable[[mx.array, mx.array], mx.array]


def header() -> str:
    return include("gate.cuh")


class SiluGate:
    """Rows (B, R, 2 I), gates first -> (B, R, I).

    Args:
        stock: the same of two arrays, for what the kernel does not take. It is what the kernel has to agree with.
    """

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._kernel: Callable[[mx.array], mx.array] | None = None
        self._is_tried = False

    def __call__(self, joined: mx.array) -> mx.array:
        if suits(joined) and (kernel := self._proven()) is not None:
            return kernel(joined)
        return self._stock(*mx.split(joined, 2, axis=-1))

    def _proven(self) -> Callable[[mx.array], mx.array] | None:
        """The kernel, if there is one for this machine and it gives what stock operations give."""
        if not self._is_tried:
            self._is_tried = True
            if mx.cuda.is_available() and mx.default_device() != mx.Device(mx.cpu):
                self._kernel = proven(CudaSilu(), self._stock)
        return self._kernel


class CudaSilu:
    """The kernel, for rows that `suits` takes."""

    def __init__(self) -> None:
        self._kernels: dict[mx.Dtype, Any] = {}  # its type is a part of the text, which MLX need not put together then

    def __call__(self, joined: mx.array) -> mx.array:
        dtype, (batch, rows, width) = joined.dtype, joined.shape
        if dtype not in self._kernels:
            name = CUDA_NAMES[dtype]
            self._kernels[dtype] = mx.fast.cuda_kernel(
                name=f"tandem_silu_gate{name}", input_names=INPUTS, output_names=OUTPUTS,
                source=constants_text(name, {}) + BODY, header=header(),
            )  # fmt: skip
        threads = joined.size // 2 * dtype.size // VECTOR_BYTES
        (out,) = self._kernels[dtype](
            inputs=[joined], output_shapes=[(batch, rows, width // 2)], output_dtypes=[dtype],
            grid=(-(-threads // THREADS) * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
        )  # fmt: skip
        return out  # type: ignore[no-any-return]


def suits(joined: mx.array) -> bool:
    """Whether the kernel takes these rows, and the device has enough to do with them."""
    if joined.ndim != 3 or joined.dtype not in (mx.bfloat16, mx.float16):
        return False
    return joined.shape[-1] // 2 * joined.dtype.size % VECTOR_BYTES == 0 and MIN_SIZE <= joined.size < MAX_SIZE


def proven(kernel: Callable[[mx.array], mx.array], stock: Stock) -> Callable[[mx.array], mx.array] | None:
    """`kernel`, if it runs and gives what `stock` gives."""
    joined = (4 * mx.random.normal((3, 5, 272), key=mx.random.key(0))).astype(mx.bfloat16)
    try:
        out, expected = kernel(joined), stock(*mx.split(joined, 2, axis=-1))
        mx.eval(out, expected)
    except (RuntimeError, ValueError) as error:
        logger.warning("the kernel of the gated unit does not run here: %s", str(error)[:300])
        return None
    if not mx.allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE).item():
        logger.warning("the kernel of the gated unit gives other values here; not used")
        return None
    return kernel
