"""What this machine computes on, and how much memory that has."""

from __future__ import annotations

import mlx.core as mx
import psutil

# Freed buffers kept for reuse, at least; as a share of the weights' size on a CPU, of the device's memory on a GPU.
# With 64 MB a step of 136 tokens of the embedded model faults no page.
CPU_CACHE_BYTES, CPU_CACHE_SHARE = 64 << 20, 1 / 8
GPU_CACHE_BYTES, GPU_CACHE_SHARE = 1 << 30, 1 / 20

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def is_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def memory() -> dict[str, int]:
    """Bytes by kind, for heartbeats; `device_total` only of a device that has memory of its own."""
    found = {"device": mx.get_active_memory(), "device_cache": mx.get_cache_memory()}
    return found | {"device_total": device_memory_bytes()} if has_own_memory() else found


def peak_memory_bytes() -> int:
    """The most that arrays of this process have held at once."""
    return int(mx.get_peak_memory())


def free_cached_memory() -> None:
    """Give back what MLX keeps for reuse."""
    mx.clear_cache()


def limit_cached_memory() -> None:
    """Bound what MLX keeps of freed buffers for reuse; by itself it keeps all, up to the memory that the device has.

    Call it when the weights are there. Steps of many shapes and pools that grow leave buffers that nothing fits again,
    and other processes use the same memory.
    """
    if is_cpu():
        limit = max(CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * mx.get_active_memory()))
    else:
        limit = max(GPU_CACHE_BYTES, int(GPU_CACHE_SHARE * device_memory_bytes()))
    mx.set_cache_limit(limit)


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


def free_device_memory_bytes() -> int:
    """What this process's arrays leave of it, and on CUDA other processes."""
    left = device_memory_bytes() - mx.get_active_memory()
    free = None if is_cpu() else mx.device_info().get("free_memory")
    return left if free is None else min(left, int(free) + mx.get_cache_memory())


def device_name() -> str:
    if is_cpu():
        return "cpu"
    return str(mx.device_info().get("device_name", mx.default_device()))


def has_own_memory() -> bool:
    """Whether the device's memory is apart from the machine's (CUDA)."""
    return not is_cpu() and not mx.metal.is_available()
