"""Who is connected: roles, epochs, when each was heard of last. Pure state."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages import Heartbeat, Role, WorkerInfo, WorkerState

LOST_AFTER_S = 1.0  # an idle worker that should be at work for so long has missed a message


@dataclass
class Peer:
    instance_id: str
    role: Role
    pid: int
    epoch: int
    last_seen: float
    info: WorkerInfo | None = None  # set once it is ready
    num_dropped_messages: int = 0  # as its last heartbeat told
    num_feature_bytes: int = 0
    lacks: tuple[str, int] | None = None  # what it had not by its last heartbeat, though it was idle
    lacks_since: float = 0.0

    @property
    def state(self) -> WorkerState:
        return "ready" if self.info is not None else "loading"

    def has_lost(self, message: Heartbeat, oldest_step: int, now: float) -> bool:
        """Whether a message to or from a worker was lost: it stays idle though it should be at work.

        Args:
            oldest_step: id of the step that the worker should be at; 0: none.
        """
        lacks = self._lacks(message, oldest_step)
        if lacks is None or lacks != self.lacks:
            self.lacks, self.lacks_since = lacks, now
        return lacks is not None and now - self.lacks_since >= LOST_AFTER_S

    def _lacks(self, message: Heartbeat, oldest_step: int) -> tuple[str, int] | None:
        if not message.is_idle:
            return None
        if message.epoch != self.epoch:
            return "welcome", self.epoch
        if self.info is None:
            return "ready", self.epoch
        return ("step", oldest_step) if oldest_step else None


class Peers:
    """Several frontends, one worker of each other role. Epochs grow with every hello, over all roles."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._peers: dict[str, Peer] = {}
        self._num_epochs = 0

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._peers

    def all(self) -> list[Peer]:
        return list(self._peers.values())

    def get(self, instance_id: str) -> Peer | None:
        return self._peers.get(instance_id)

    def by_id(self, instance_id: str) -> Peer:
        return self._peers[instance_id]

    def by_role(self, role: Role) -> Peer | None:
        return next((p for p in self._peers.values() if p.role == role), None)

    def seen(self, instance_id: str, now: float) -> Peer | None:
        peer = self._peers.get(instance_id)
        if peer is not None:
            peer.last_seen = now
        return peer

    def replaced_by(self, role: Role, instance_id: str) -> Peer | None:
        """The worker that a new one of this role replaces."""
        if role == "frontend":
            return None
        old = self.by_role(role)
        return old if old is not None and old.instance_id != instance_id else None

    def add(self, instance_id: str, role: Role, pid: int, now: float) -> Peer:
        self._num_epochs += 1
        peer = Peer(instance_id, role, pid, self._num_epochs, now)
        self._peers[instance_id] = peer
        return peer

    def remove(self, instance_id: str) -> None:
        del self._peers[instance_id]

    def lost(self, now: float) -> list[Peer]:
        return [p for p in self._peers.values() if now - p.last_seen > self._timeout_s]
