"""What this machine computes on, and how much memory that has."""

from __future__ import annotations

import mlx.core as mx
import psutil

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def is_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def memory() -> dict[str, int]:
    """Bytes by kind, for heartbeats."""
    return {"device": mx.get_active_memory(), "device_cache": mx.get_cache_memory()}


def peak_memory_bytes() -> int:
    """The most that arrays of this process have held at once."""
    return int(mx.get_peak_memory())


def free_cached_memory() -> None:
    """Give back what MLX keeps for reuse."""
    mx.clear_cache()


def disable_compile() -> None:
    """On Linux's CPU backend `mx.compile` calls a compiler at run time, for nothing; where it is too late for the
    variable that `workers.blas.prepare` sets."""
    mx.disable_compile()


def device_memory_bytes() -> int:
    """Memory that the device may use in all."""
    if is_cpu():
        return int(psutil.virtual_memory().total)
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
    return int(limit or psutil.virtual_memory().total)


def device_name() -> str:
    if is_cpu():
        return "cpu"
    return str(mx.device_info().get("device_name", mx.default_device()))


def has_own_memory() -> bool:
    """Whether the device's memory is apart from the machine's (CUDA)."""
    return not is_cpu() and not mx.metal.is_available()
