"""A cable that can be cut: passes on the bytes of ZeroMQ sockets, and breaks connections in the middle of a message."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

CHUNK_BYTES = 1 << 16
POLL_S = 0.2


class Connection:
    """Two pumps, one for each direction; where one ends, so does the other."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.is_to_be_cut = False
        self.num_cuts = 0
        self._ends = (near, far)
        self._threads = [
            threading.Thread(target=self._pump, args=ends, daemon=True) for ends in ((near, far), (far, near))
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if self.is_to_be_cut:
                    sink.sendall(data[: len(data) // 2])
                    self.num_cuts = 1
                    break
                sink.sendall(data)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @property
    def is_alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._ends:
            end.close()


class Cable(threading.Thread):
    """Args:
    near: the Unix socket that others connect to.
    far: the one where the connections lead.
    """

    def __init__(self, near: Path, far: Path) -> None:
        super().__init__(name=f"cable {near.name}", daemon=True)
        self._far = far
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(near))
        self._listener.listen()
        self._listener.settimeout(POLL_S)
        self._connections: list[Connection] = []
        self._stopped = threading.Event()
        self.start()

    def cut(self) -> None:
        """Each connection there is breaks in the middle of the next bytes that it carries."""
        for connection in self._connections:
            connection.is_to_be_cut = True

    @property
    def num_cuts(self) -> int:
        return sum(connection.num_cuts for connection in self._connections)

    @property
    def num_alive(self) -> int:
        return sum(connection.is_alive for connection in self._connections)

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            near.setblocking(True)
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self._far))
            except OSError:  # nobody is there yet: ZeroMQ tries again
                near.close()
                far.close()
                continue
            self._connections.append(Connection(near, far))

    def stop(self) -> None:
        self._stopped.set()
        self.join(10)
        self._listener.close()
        for connection in self._connections:
            connection.close()
