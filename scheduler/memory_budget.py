"""One budget for the memory of all processes, so that the server says no before the machine begins to swap."""

from __future__ import annotations

DEVICE_KINDS = ("device", "device_cache")
HARD_PER_SOFT = 1.05  # where no hard limit is set
DEVICE_SHARE = 0.97  # of a device's own memory: the pools are sized for less than that


class MemoryBudget:
    """Args:
    soft_limit_bytes: at this sum no new requests are taken, none of those that wait gets a slot, and caches shrink.
    hard_limit_bytes: at this sum running sequences are preempted as well; 0: a little above the soft one.
    """

    def __init__(self, soft_limit_bytes: int, hard_limit_bytes: int = 0) -> None:
        self.soft_limit_bytes = soft_limit_bytes
        self._hard_limit_bytes = hard_limit_bytes
        self._used: dict[str, int] = {}
        self._on_device: dict[str, int] = {}  # of a device that has memory of its own
        self._device_bytes = 0  # that it has in all
        self._news: set[str] = set()  # processes that have told of themselves since `take_news`

    def note(self, process: str, memory_bytes: dict[str, int]) -> None:
        """What a process told of itself. Where memory is one (a Mac, a CPU) the device's is part of the resident one,
        or the other way round, so the larger of the two counts. A device with memory of its own (`device_total`) takes
        nothing of the machine's, and has a limit of its own."""
        device = sum(max(0, memory_bytes.get(kind, 0)) for kind in DEVICE_KINDS)
        resident = memory_bytes.get("resident", 0)
        if total := memory_bytes.get("device_total", 0):
            self._device_bytes = total
            self._used[process], self._on_device[process] = resident, device
        else:
            self._used[process] = max(device, resident)
        self._news.add(process)

    def forget(self, process: str) -> None:
        self._used.pop(process, None)
        self._on_device.pop(process, None)
        self._news.discard(process)

    def take_news(self, process: str) -> bool:
        """Whether this process has told of itself since the last call: only then can anything have had an effect."""
        is_new = process in self._news
        self._news.discard(process)
        return is_new

    @property
    def used_bytes(self) -> int:
        """Of the machine's memory."""
        return sum(self._used.values())

    @property
    def device_used_bytes(self) -> int:
        """Of a device's own memory."""
        return sum(self._on_device.values())

    @property
    def _device_limit_bytes(self) -> int:
        return int(DEVICE_SHARE * self._device_bytes)

    @property
    def is_full(self) -> bool:
        return self.used_bytes >= self.soft_limit_bytes or self._is_device_full

    @property
    def is_overfull(self) -> bool:
        hard = self._hard_limit_bytes or int(HARD_PER_SOFT * self.soft_limit_bytes)
        return self.used_bytes >= max(self.soft_limit_bytes, hard) or self._is_device_full

    @property
    def _is_device_full(self) -> bool:
        return bool(self._on_device) and self.device_used_bytes >= self._device_limit_bytes

    def __str__(self) -> str:
        """What is full: used bytes of the limit."""
        if self.used_bytes < self.soft_limit_bytes and self._is_device_full:
            return f"{self.device_used_bytes} of {self._device_limit_bytes} bytes on the device"
        return f"{self.used_bytes} of {self.soft_limit_bytes} bytes"
