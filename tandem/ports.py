"""Whether a port is free, and who holds it."""

from __future__ import annotations

import socket

import psutil

from shared.config import Settings
from shared.errors import BadConfig, Unavailable

MAX_PORT = 65535


def check_port(settings: Settings) -> None:
    """Raises:
    BadConfig: the host is no address of this machine.
    Unavailable: another process listens there.
    """
    where = f"{settings.host}:{settings.port}"
    if not 0 <= settings.port <= MAX_PORT:  # getaddrinfo takes others modulo 65536
        raise BadConfig(f"--port {settings.port}: ports are numbers up to {MAX_PORT}")
    try:
        addresses = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: no wait for TIME_WAIT
                probe.bind(address)
                probe.listen(1)  # on Linux two may bind to one port with SO_REUSEADDR, but only one may listen
    except PermissionError as error:
        raise BadConfig(f"--port {settings.port}: ports below 1024 need root; choose a higher one") from error
    except socket.gaierror as error:
        raise BadConfig(f"--host {settings.host} --port {settings.port}: no such address") from error
    except OSError as error:
        holder = holder_of(settings.port)
        if holder is None and error.strerror and "in use" not in error.strerror:
            raise BadConfig(f"--host {settings.host}: {error.strerror}") from error
        by = holder or "a process that this user may not see"
        raise Unavailable(f"{where} is in use by {by}: end it, or choose another port with --port") from error


def holder_of(port: int) -> str | None:
    """The process that listens on `port`, as "process 12 (python -m http.server)"; None where it cannot be seen."""
    for process in psutil.process_iter():
        try:
            connections = process.net_connections(kind="tcp")
            if any(c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port for c in connections):
                command = " ".join(process.cmdline()) or process.name()
                return f"process {process.pid} ({command[:120]})"
        except psutil.Error:
            continue  # gone, or another user's
    return None
