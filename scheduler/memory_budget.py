"""One budget for the memory of all processes, so that the server says no before the machine begins to swap."""

from __future__ import annotations

DEVICE_KINDS = ("device", "device_cache")


class MemoryBudget:
    """Args:
    soft_limit_bytes: at this sum no new requests are taken; what runs goes on in memory it holds already.
    """

    def __init__(self, soft_limit_bytes: int) -> None:
        self.soft_limit_bytes = soft_limit_bytes
        self._used: dict[str, int] = {}

    def note(self, process: str, memory_bytes: dict[str, int]) -> None:
        """What a process told of itself. Where memory is one (a Mac, a CPU) the device's is part of the resident one,
        or the other way round, so the larger of the two counts."""
        device = sum(max(0, memory_bytes.get(kind, 0)) for kind in DEVICE_KINDS)
        self._used[process] = max(device, memory_bytes.get("resident", 0))

    def forget(self, process: str) -> None:
        self._used.pop(process, None)

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    @property
    def is_full(self) -> bool:
        return self.used_bytes >= self.soft_limit_bytes
