"""Which addresses the processes' sockets may have, and the keys that guard those on a network.

On one machine the sockets are files in the private run folder. Over TCP connections are encrypted and the key file is
the credential: CurveZMQ's first message can only be made by who knows the server's public key, which here is known from
that file alone. Source: CurveZMQ, https://rfc.zeromq.org/spec/26/.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

import zmq

from shared.config import Settings
from shared.errors import BadConfig


def check_addresses(settings: Settings) -> None:
    """Raises BadConfig: an address is malformed, or on a network without keys."""
    for name, address in (("ENGINE", settings.engine_address), ("FEATURES", settings.features_address)):
        if not address or address.startswith("ipc://"):
            continue
        setting = f"TANDEM_{name}_ADDRESS {address!r}"
        try:
            parts = urlsplit(address)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise BadConfig(f"{setting} is malformed") from error
        if parts.scheme != "tcp" or not host or not port:
            raise BadConfig(f"{setting} is neither ipc://path nor tcp://host:port")
        if not _is_loopback(host) and not settings.curve_keys_file:
            raise BadConfig(f"{setting} is reachable from outside: TANDEM_CURVE_KEYS_FILE is needed (tandem keys FILE)")
    if settings.curve_keys_file:
        read_keys(Path(settings.curve_keys_file))


def _is_loopback(host: str) -> bool:
    """Only an address counts: a name can lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def write_keys(path: Path) -> None:
    """Make a key file, for all machines of one deployment.

    Raises:
        BadConfig: it exists, or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise BadConfig(f"{path} cannot be made: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(public + b"\n" + secret + b"\n")


def read_keys(path: Path) -> tuple[bytes, bytes]:
    """(public, secret), each 40 characters of Z85.

    Raises:
        BadConfig: the file is missing, open to others, or not one of `write_keys`.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise BadConfig(f"TANDEM_CURVE_KEYS_FILE {path} can be read by others; make it 0600")
        public, secret = path.read_bytes().split()
        if zmq.curve_public(secret) != public:
            raise ValueError
    except (OSError, ValueError, zmq.ZMQError) as error:
        raise BadConfig(f"TANDEM_CURVE_KEYS_FILE {path} is not a key file (tandem keys FILE makes one)") from error
    return public, secret


def secure(socket: zmq.Socket[bytes], settings: Settings, endpoint: str, *, is_server: bool) -> None:
    """Before bind or connect: encrypt and authenticate a TCP connection, where there are keys."""
    if not settings.curve_keys_file or not endpoint.startswith("tcp://"):
        return
    public, secret = read_keys(Path(settings.curve_keys_file))
    socket.curve_publickey, socket.curve_secretkey = public, secret
    if is_server:
        socket.curve_server = True
    else:
        socket.curve_serverkey = public
