"""What a machine with a GPU of its own memory is told to keep, and tells."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

from workers import machine

pytestmark = pytest.mark.mlx

GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU of 80 GiB of which arrays of this process hold 16, and buffers for reuse 2; what MLX says of it."""
    info = {"total_memory": 80 * GIB}
    monkeypatch.setattr(machine, "is_cpu", lambda: False)
    monkeypatch.setattr(machine.mx, "device_info", lambda: info)
    monkeypatch.setattr(machine.mx, "get_active_memory", lambda: 16 * GIB)
    monkeypatch.setattr(machine.mx, "get_cache_memory", lambda: 2 * GIB)
    return info


def test_a_gpu_keeps_a_twentieth_of_its_memory_for_reuse(gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(machine.mx, "set_cache_limit", limits.append)
    machine.limit_cached_memory()
    gpu["total_memory"] = 6 * GIB
    machine.limit_cached_memory()
    assert limits == [4 * GIB, GIB]


def test_pools_are_sized_for_what_other_processes_leave(gpu: dict[str, int]) -> None:
    assert machine.free_device_memory_bytes() == 64 * GIB
    gpu["free_memory"] = 30 * GIB
    assert machine.free_device_memory_bytes() == 32 * GIB
    gpu["free_memory"] = 70 * GIB  # of before the weights came
    assert machine.free_device_memory_bytes() == 64 * GIB


def test_heartbeats_say_when_memory_is_the_devices_own(gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.mx.metal, "is_available", lambda: False)
    assert machine.memory() == {"device": 16 * GIB, "device_cache": 2 * GIB, "device_total": 80 * GIB}
    monkeypatch.setattr(machine.mx.metal, "is_available", lambda: True)
    assert machine.memory() == {"device": 16 * GIB, "device_cache": 2 * GIB}
