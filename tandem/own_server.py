"""A server for the time of one command: on a free port, with a run folder of its own, gone when the command ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from shared.config import PREFIX
from shared.errors import Unavailable

READY_S = 600.0  # a checkpoint may have to be fetched and converted
STOP_S = 10.0
REQUEST_S = 600.0

# What a process says when it refuses to start: "tandem: ..." or, behind honcho's prefix, "target: ...".
_REFUSAL = re.compile(r"(?:^|\| )(?:tandem|frontend|scheduler|target|drafter): (?P<reason>.+)$", re.MULTILINE)


@contextmanager
def own_server(settings: Mapping[str, str]) -> Iterator[httpx.Client]:
    """A ready process tree with these settings, over what the environment and tandem.toml say.

    It is the leader of a session of its own: Ctrl-C reaches this command alone, which stops the server in order.

    Args:
        settings: by their names in capitals, "MODEL".
    Raises:
        Unavailable: it did not become ready; the message has its own reason.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="tandem-own-") as name:
        folder = Path(name)
        own = {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "RUN_DIR": str(folder / "run"),
            "RESPONSES_FILE": str(folder / "responses.sqlite3"),
            "ENGINE_ADDRESS": "",
            "FEATURES_ADDRESS": "",
            "API_KEYS": "",
            "API_KEYS_FILE": "",
            **settings,
        }
        environment = {**os.environ, **{PREFIX + key: value for key, value in own.items()}}
        log = folder / "server.log"
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=REQUEST_S, trust_env=False)
        with log.open("wb") as out, client:
            process = subprocess.Popen(
                [sys.executable, "-m", "tandem", "serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait_ready(client, process, log)
                yield client
            finally:
                _stop(process)


def _wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            health = client.get("/health", timeout=2.0)
            if health.status_code == 200 and health.json()["drafter"] == "ready":
                return
        except httpx.HTTPError:
            pass  # it does not listen yet
        time.sleep(0.1)  # another process's state, which only asking tells
    raise Unavailable(f"the server did not become ready: {reason(log.read_text(errors='replace'))}")


def reason(log: str) -> str:
    """Why a server ended, from its output: the first refusal, else the last line."""
    refusal = _REFUSAL.search(log)
    if refusal is not None:
        return refusal["reason"]
    return (log.strip().splitlines() or ["it said nothing"])[-1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; whoever is left after STOP_S is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session is ours alone
        process.wait()
