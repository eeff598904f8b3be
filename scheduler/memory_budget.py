"""One budget for the memory of all processes, so that the server says no before the machine begins to swap."""

from __future__ import annotations

DEVICE_KINDS = ("device", "device_cache")
HARD_PER_SOFT = 1.05  # where no hard limit is set


class MemoryBudget:
    """Args:
    soft_limit_bytes: at this sum no new requests are taken, none of those that wait gets a slot, and caches shrink.
    hard_limit_bytes: at this sum running sequences are preempted as well; 0: a little above the soft one.
    """

    def __init__(self, soft_limit_bytes: int, hard_limit_bytes: int = 0) -> None:
        self.soft_limit_bytes = soft_limit_bytes
        self._hard_limit_bytes = hard_limit_bytes
        self._used: dict[str, int] = {}
        self._news: set[str] = set()  # processes that have told of themselves since `take_news`

    def note(self, process: str, memory_bytes: dict[str, int]) -> None:
        """What a process told of itself. Where memory is one (a Mac, a CPU) the device's is part of the resident one,
        or the other way round, so the larger of the two counts."""
        device = sum(max(0, memory_bytes.get(kind, 0)) for kind in DEVICE_KINDS)
        self._used[process] = max(device, memory_bytes.get("resident", 0))
        self._news.add(process)

    def forget(self, process: str) -> None:
        self._used.pop(process, None)
        self._news.discard(process)

    def take_news(self, process: str) -> bool:
        """Whether this process has told of itself since the last call: only then can anything have had an effect."""
        is_new = process in self._news
        self._news.discard(process)
        return is_new

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    @property
    def is_full(self) -> bool:
        return self.used_bytes >= self.soft_limit_bytes

    @property
    def is_overfull(self) -> bool:
        return self.used_bytes >= max(
            self.soft_limit_bytes, self._hard_limit_bytes or int(HARD_PER_SOFT * self.soft_limit_bytes)
        )
