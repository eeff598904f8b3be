"""A worker's connection to the scheduler: hello, heartbeats from a thread of their own, typed messages both ways."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil
import zmq

from shared.beat import Beat
from shared.config import Settings
from shared.errors import BadMessage
from shared.messages import Heartbeat, Hello, Message, Ready, Role, SayHello, WorkerInfo
from shared.sockets import secure
from shared.supervise import last_exit
from shared.wire import Decoder, encode

log = logging.getLogger(__name__)

LINGER_MS = 500


class Link:
    """Args:
    role: ours.
    messages: union of what the scheduler may send us.
    memory: device memory figures for the heartbeats, called from the heartbeat thread.
    """

    def __init__(
        self,
        settings: Settings,
        role: Role,
        messages: Any,  # noqa: ANN401 - a union of Message classes has no narrower type
        memory: Callable[[], dict[str, int]],
    ) -> None:
        self.instance_id = uuid.uuid4().hex
        self.num_dropped = 0
        self.num_feature_bytes = 0
        self.epoch = 0  # of the last Welcome, for the heartbeats
        self._is_idle = False  # until the model is loaded and the main loop asks for messages
        self._settings = settings
        self._role = role
        self._memory = memory
        self._decoder = Decoder(messages)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, self.instance_id.encode())
        self._socket.set(zmq.LINGER, LINGER_MS)
        secure(self._socket, settings, settings.engine_endpoint, is_server=False)
        self._socket.connect(settings.engine_endpoint)
        self._stopped = threading.Event()
        self._file_beat = Beat(settings, role)
        self._last_active: float | None = None  # when the main loop was here last; None while the model loads
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.hello()
        self._thread.start()

    def hello(self) -> None:
        self.send(Hello(role=self._role, instance_id=self.instance_id, pid=os.getpid(), last_exit=last_exit()))

    def ready(self, info: WorkerInfo) -> None:
        """Tell the scheduler and the supervisor that work can begin."""
        self._file_beat.ready()
        self.send(Ready(epoch=self.epoch, info=info))

    def send(self, message: Message) -> None:
        """Queue a message; ZeroMQ keeps it while the scheduler is away."""
        self._socket.send(encode(message))

    def receive(self, timeout_s: float, is_idle: bool = True) -> Message | None:
        """The next message, or None when none comes in time. A request to say hello again is answered here.

        Args:
            is_idle: nothing but a message gives the worker anything to do. The scheduler hears of it, and finds a
                message that was lost by what an idle worker ought to have.
        """
        self._last_active = time.monotonic()
        self._is_idle = is_idle
        deadline = self._last_active + timeout_s  # heartbeats that keep coming do not put it off
        while self._socket.poll(max(0, round((deadline - time.monotonic()) * 1000))):
            frames = self._socket.recv_multipart()
            try:
                if len(frames) != 1:
                    raise BadMessage(f"{len(frames)} frames instead of 1")
                message: Message = self._decoder.decode(frames[0])
            except BadMessage as error:
                self.num_dropped += 1
                log.warning("dropped a bad message: %s", str(error)[:200])
                continue
            if isinstance(message, SayHello):
                self.hello()
            elif not isinstance(message, Heartbeat):
                self._is_idle = False
                return message
        return None

    def close(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        self._socket.close()
        self._context.term()

    def _is_stuck(self) -> bool:
        """Whether the main loop has been away for longer than any step may take."""
        active = self._last_active
        return active is not None and time.monotonic() - active > self._settings.step_timeout_s

    def _beat(self) -> None:
        """Sends heartbeats, so that a long step is not taken for a death. Runs until `close`."""
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 2)
        secure(socket, self._settings, self._settings.engine_endpoint, is_server=False)
        socket.connect(self._settings.engine_endpoint)
        process = psutil.Process()
        try:
            while not self._stopped.wait(self._settings.heartbeat_interval_s):
                if not self._is_stuck():
                    self._file_beat.touch()
                memory = {"resident": process.memory_info().rss, **self._memory()}
                beat = Heartbeat(
                    instance_id=self.instance_id,
                    memory_bytes=memory,
                    num_dropped_messages=self.num_dropped,
                    num_feature_bytes=self.num_feature_bytes,
                    epoch=self.epoch,
                    is_idle=self._is_idle,
                )
                try:
                    socket.send(encode(beat), zmq.NOBLOCK)
                except zmq.Again:
                    continue  # the scheduler is away; hello will be said again when it is back
        finally:
            socket.close()
