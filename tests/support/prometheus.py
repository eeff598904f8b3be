"""Debian's Prometheus on loopback, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import free_port

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
WHY_NOT = "no Prometheus here (apt-get install prometheus)"
STOP_S = 10.0
READY_S = 60.0


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=10)

    def ask(self, path: str, **params: str) -> Any:
        """The `data` of an API answer.

        Raises:
            AssertionError: the query is not valid.
        """
        answer = self.http.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result

    def wait_for(self, expression: str, timeout_s: float = READY_S) -> None:
        """Ask until the expression gives something: a scrape that only Prometheus knows of."""
        deadline = time.monotonic() + timeout_s
        while not self.query(expression):
            assert time.monotonic() < deadline, f"nothing after {timeout_s} s: {expression}"
            time.sleep(0.1)


@contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[Prometheus]:
    """Run it with this configuration; its data goes to `folder`."""
    assert PROMETHEUS is not None, WHY_NOT
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [
        PROMETHEUS,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}",
        f"--web.listen-address={address}",
    ]
    log = folder / "prometheus.log"
    folder.mkdir(exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    running = Prometheus(f"http://{address}")
    try:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                if running.http.get("/-/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass  # not listening yet
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        yield running
    finally:
        running.http.close()
        process.terminate()
        process.wait(STOP_S)
