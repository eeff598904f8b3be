"""A bad connection: stands between the scheduler and everybody else, and repeats, swaps, delays and loses messages."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import zmq

POLL_MS = 5


@dataclass(frozen=True)
class Faults:
    """Chances per message, and how long a delayed one waits."""

    repeat: float = 0.0
    swap: float = 0.0
    delay: float = 0.0
    lose: float = 0.0
    delay_s: float = 0.05


@dataclass
class Lane:
    """One direction of one peer's connection: what waits to be passed on, each with its time."""

    waiting: list[tuple[float, list[bytes]]] = field(default_factory=list)
    held: list[bytes] | None = None  # to be swapped with the next one
    not_before: float = 0.0

    def add(self, frames: list[bytes], now: float, faults: Faults, rng: random.Random, counts: Counter[str]) -> None:
        chance = rng.random
        if chance() < faults.lose:
            counts["lost"] += 1
            return
        if chance() < faults.delay:
            self.not_before = now + faults.delay_s
            counts["delayed"] += 1
        if self.held is None and chance() < faults.swap:
            self.held = frames
            return
        self._queue(frames, now)
        if chance() < faults.repeat:
            self._queue(frames, now)
            counts["repeated"] += 1
        if self.held is not None:
            self._queue(self.held, now)
            self.held = None
            counts["swapped"] += 1

    def _queue(self, frames: list[bytes], now: float) -> None:
        self.waiting.append((max(now, self.not_before), frames))

    def due(self, now: float) -> list[list[bytes]]:
        ready = [frames for at, frames in self.waiting if at <= now]
        self.waiting = self.waiting[len(ready) :]
        return ready


class Proxy(threading.Thread):
    """Args:
    outer: run folder of the frontend and the workers.
    inner: run folder of the scheduler.
    """

    def __init__(self, outer: Path, inner: Path, seed: int = 0) -> None:
        super().__init__(name="proxy", daemon=True)
        self.faults = Faults()
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._inner = f"ipc://{inner}/engine.sock"
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.ROUTER_HANDOVER, 1)
        self._router.set(zmq.LINGER, 0)
        self._router.bind(f"ipc://{outer}/engine.sock")
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}
        self._lanes: dict[tuple[bytes, bool], Lane] = {}  # (peer, towards the scheduler)
        self._stopped = threading.Event()
        self.start()

    def stop(self) -> None:
        self._stopped.set()
        self.join(10)
        for socket in (self._router, *self._dealers.values()):
            socket.close()
        self._context.term()

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        while not self._stopped.is_set():
            events = dict(poller.poll(POLL_MS))
            if self._router in events:
                identity, *frames = self._router.recv_multipart()
                if identity not in self._dealers:
                    poller.register(self._dealer(identity), zmq.POLLIN)
                self._add(identity, True, frames)
            for identity, dealer in self._dealers.items():
                if dealer in events:
                    self._add(identity, False, dealer.recv_multipart())
            self._pass_on()

    def _dealer(self, identity: bytes) -> zmq.Socket[bytes]:
        dealer = self._dealers[identity] = self._context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        if not identity.startswith(b"\0"):  # those are ZeroMQ's own, for sockets that chose none
            dealer.set(zmq.IDENTITY, identity)
        dealer.connect(self._inner)
        return dealer

    def _add(self, identity: bytes, is_inward: bool, frames: list[bytes]) -> None:
        lane = self._lanes.setdefault((identity, is_inward), Lane())
        lane.add(frames, time.monotonic(), self.faults, self._random, self.counts)

    def _pass_on(self) -> None:
        now = time.monotonic()
        for (identity, is_inward), lane in self._lanes.items():
            for frames in lane.due(now):
                if is_inward:
                    self._dealers[identity].send_multipart(frames)
                else:
                    self._router.send_multipart([identity, *frames])
