"""Sockets on a network need keys, and who has others does not get in."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from shared.config import Settings
from shared.errors import BadConfig
from shared.sockets import check_addresses, read_keys, secure, write_keys


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:5555", "tcp://10.0.0.1:5555", "tcp://[::]:5555", "tcp://localhost:5555", "tcp://*:5555",
     "tcp://example.org:5555", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "udp://127.0.0.1:5", "127.0.0.1:5555"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["engine_address", "features_address"])
def test_an_address_that_others_can_reach_is_refused_without_keys(name: str, address: str) -> None:
    with pytest.raises(BadConfig, match="ADDRESS"):
        check_addresses(Settings(**{name: address}))  # type: ignore[arg-type]  # one setting by name


def test_with_keys_it_is_accepted_and_loopback_needs_none(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys")
    for address in ("tcp://0.0.0.0:5555", "tcp://example.org:5555"):
        check_addresses(Settings(engine_address=address, curve_keys_file=str(tmp_path / "keys")))
    for address in ("tcp://127.0.0.1:5555", "tcp://[::1]:5555", "ipc:///tmp/x", ""):
        check_addresses(Settings(engine_address=address))


def test_a_key_file_is_private_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write_keys(file)
    assert file.stat().st_mode & 0o777 == 0o600
    public, secret = read_keys(file)
    assert len(public) == len(secret) == 40
    with pytest.raises(BadConfig, match="cannot be made"):
        write_keys(file)
    file.chmod(0o644)
    with pytest.raises(BadConfig, match="0600"):
        read_keys(file)
    file.chmod(0o600)
    file.write_bytes(secret + b"\n" + public + b"\n")
    with pytest.raises(BadConfig, match="not a key file"):
        check_addresses(Settings(curve_keys_file=str(file)))


def test_only_who_has_the_file_gets_through(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        write_keys(tmp_path / name)
    ours = Settings(curve_keys_file=str(tmp_path / "ours"))
    theirs = Settings(curve_keys_file=str(tmp_path / "theirs"))
    context = zmq.Context()
    sockets = [server := context.socket(zmq.ROUTER)]
    try:
        secure(server, ours, "tcp://", is_server=True)
        port = server.bind_to_random_port("tcp://127.0.0.1")

        def knock(settings: Settings, word: bytes) -> None:
            sockets.append(socket := context.socket(zmq.DEALER))
            secure(socket, settings, "tcp://", is_server=False)
            socket.connect(f"tcp://127.0.0.1:{port}")
            socket.send(word)

        knock(Settings(), b"plain")
        knock(theirs, b"other keys")
        knock(ours, b"the file")
        assert server.poll(20_000)
        assert server.recv_multipart()[1] == b"the file"
        assert not server.poll(500), "somebody else got in"
    finally:
        for socket in sockets:
            socket.close(linger=0)
        context.term()
