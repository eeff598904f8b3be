"""The scheduler process: a ROUTER socket around the core. `python -m scheduler`."""

from __future__ import annotations

import logging
import signal
import sys
import time
from types import FrameType

import psutil
import zmq

from scheduler import learned_files
from scheduler.core import Core
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope
from shared import config, log, served
from shared.api_keys import load_keys
from shared.beat import Beat
from shared.errors import BadConfig, BadMessage
from shared.messages import Heartbeat, ToScheduler
from shared.model_files import display_name
from shared.sockets import check_addresses, secure
from shared.supervise import EXIT_CONFIG
from shared.wire import Decoder, encode

SEND_QUEUE = 100_000  # messages waiting for one peer before it counts as lost
LINGER_MS = 1000
KEEP_INTERVAL_S = 60.0  # between two times that what speculation learned is written
MEMORY_SHARE = 0.9  # of the machine's memory, where no limit is set


class Process:
    """Receive, decode, handle, send. Peers are addressed by the identity they chose: their instance id."""

    def __init__(self, settings: config.Settings) -> None:
        self.settings = settings
        self.log = logging.getLogger("scheduler")
        weights = {key.tenant: key.weight for key in load_keys(settings)}
        known = learned_files.load(settings.cache_folder)
        self.core = Core(settings, Metrics(display_name(settings.model, settings)), weights, known)
        self._keep_at = time.monotonic() + KEEP_INTERVAL_S
        self._decoder = Decoder(ToScheduler)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.SNDHWM, SEND_QUEUE)
        self._socket.set(zmq.RCVHWM, SEND_QUEUE)
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._stopping = False
        self._is_restart = False
        self._beat = Beat(settings, "scheduler")
        self._process = psutil.Process()
        if not settings.memory_limit_bytes:
            self.core.memory.soft_limit_bytes = int(MEMORY_SHARE * psutil.virtual_memory().total)

    def restart(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End without a word to the requests: their frontends bring them to the next scheduler."""
        self._stopping = self._is_restart = True

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self._stopping = True

    def run(self) -> None:
        config.prepare_run_folder(self.settings)
        secure(self._socket, self.settings, self.settings.engine_endpoint, is_server=True)
        self._socket.bind(self.settings.engine_endpoint)
        interval = self.settings.heartbeat_interval_s
        next_tick = time.monotonic()
        self.log.info("listening on %s", self.settings.engine_endpoint)
        try:
            while not self._stopping:
                deadline = self.core.deadline
                wait = max(0.0, min(next_tick, deadline or next_tick) - time.monotonic())
                has_come = self._socket.poll(0)
                while not has_come and self.core.work_ahead():
                    has_come = self._socket.poll(0)
                if has_come or self._socket.poll(int(wait * 1000) + 1):
                    self._receive()
                if deadline is not None and time.monotonic() >= deadline:
                    self._send(self.core.wake(time.monotonic()))
                if time.monotonic() >= next_tick:
                    self._send(self.core.tick(time.monotonic()))
                    self._replace_hung()
                    self._note_memory()
                    if time.monotonic() >= self._keep_at:
                        self._keep_learned()
                    self._beat.touch()
                    next_tick = time.monotonic() + interval
            if not self._is_restart:
                self._send(self.core.shutdown(time.monotonic()))
        finally:
            self._keep_learned()
            self._socket.close()
            self._context.term()

    def _receive(self) -> None:
        """Handle all that has come."""
        while True:
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise BadMessage(f"{len(frames)} frames instead of 1")
                message = self._decoder.decode(frames[0])
                # A worker's heartbeats come through a socket of their own, so that a long step cannot delay them.
                sender = message.instance_id if isinstance(message, Heartbeat) else identity.decode("ascii")
                if not sender.isascii():  # answers go to this name
                    raise BadMessage("an instance id that is not ASCII")
            except (BadMessage, UnicodeDecodeError) as error:
                self.core.metrics.dropped["bad"].inc()
                self.log.warning("dropped a bad message: %s", str(error)[:200])
                continue
            self._send(self.core.handle(sender, message, time.monotonic()))

    def _keep_learned(self) -> None:
        self._keep_at = time.monotonic() + KEEP_INTERVAL_S
        key = self.core.speculator.keep()
        if key is not None:
            learned_files.save(self.settings.cache_folder, self.core.speculator.known, [key])

    def _note_memory(self) -> None:
        """Our own share of the budget; the others tell theirs with their heartbeats."""
        memory = {"resident": self._process.memory_info().rss}
        self.core.metrics.set_memory("scheduler", memory)
        self.core.memory.note("scheduler", memory)

    def _replace_hung(self) -> None:
        """Kill workers whose step does not end; their supervisors start new ones. Others' pids are left alone."""
        for pid in self.core.hung:
            try:
                process = psutil.Process(pid)
                parent = process.parent()
                if parent is not None and "shared.supervise" in parent.cmdline():
                    self.log.error("a step does not end; killing process %d", pid)
                    process.kill()
            except psutil.Error as error:
                self.log.warning("process %d: %s", pid, error)
        self.core.hung.clear()

    def _send(self, envelopes: list[Envelope]) -> None:
        for receiver, message in envelopes:
            try:
                self._socket.send_multipart([receiver.encode("ascii"), encode(message)], zmq.NOBLOCK)
            except zmq.Again:
                self.log.error("%s does not read its messages; treating it as lost", receiver[:8])
                self._send(self.core.lose(receiver, time.monotonic()))
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise  # a peer that is gone is found by its missing heartbeats


def main() -> int:
    try:
        settings, _ = served.load()
        log.set_up("scheduler", settings.log_level)
        check_addresses(settings)
        process = Process(settings)
    except BadConfig as error:
        print(f"scheduler: {error}", file=sys.stderr)
        return EXIT_CONFIG
    signal.signal(signal.SIGTERM, process.stop)
    signal.signal(signal.SIGINT, process.stop)
    signal.signal(signal.SIGHUP, process.restart)
    process.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
