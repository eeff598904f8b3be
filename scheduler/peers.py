"""Who is connected: roles, epochs, when each was heard of last. Pure state."""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages import Role, WorkerInfo, WorkerState


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

    @property
    def state(self) -> WorkerState:
        return "ready" if self.info is not None else "loading"


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
