"""A full disk costs cached copies and stored responses, never an answer or a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import httpx
import psutil
import pytest

from tests.faults.test_kills import IS_LONG, MODULES
from tests.support.server import Server
from tests.support.stream import BODY

pytestmark = [
    pytest.mark.system,
    pytest.mark.mlx,
    pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and limits of other processes are Linux's"),
]

DISK_BYTES = 4 << 20
PROMPT = " ".join(f"{i} bottles" for i in range(30))


class Disk(Protocol):
    """Where the server keeps its files."""

    place: Path

    def fill(self, server: Server) -> None: ...
    def free(self, server: Server) -> None: ...


class SmallDisk:
    """A file system of its own, filled to its last byte."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._ballast = place / "ballast"

    def fill(self, server: Server) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 9, 1):
                try:
                    while file.write(b"x" * size):
                        continue
                except OSError:
                    continue

    def free(self, server: Server) -> None:
        self._ballast.unlink()


class SmallFiles:
    """The stand-in where nothing may be mounted: the processes' files may not grow."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self, server: Server) -> None:
        self._limit(server, 100)

    def free(self, server: Server) -> None:
        self._limit(server, psutil.RLIM_INFINITY)

    def _limit(self, server: Server, num_bytes: int) -> None:
        for module in ("frontend", "workers.target"):
            process = server.worker(module)
            process.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, process.rlimit(psutil.RLIMIT_FSIZE)[1]))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield SmallFiles(place)
        return
    try:
        yield SmallDisk(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def ask(server: Server, prompt: str) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"prompt": prompt, "max_tokens": 40}, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def respond(server: Server, **options: object) -> httpx.Response:
    body = {"model": "default", "input": "Hi", "max_output_tokens": 16, "temperature": 0, **options}
    return httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_a_full_disk_takes_no_answer_and_no_process(model: Path, disk: Disk, tmp_path: Path) -> None:
    with Server(
        model, tmp_path, prefix_dir=disk.place / "prefix", responses_file=disk.place / "responses.sqlite3"
    ) as server:
        processes = {module: server.worker(module) for module in ("frontend", *MODULES)}
        prompts = [f"{i} {PROMPT}" for i in range(3)]
        expected = [ask(server, prompt) for prompt in prompts]
        kept = respond(server)
        assert kept.status_code == 200
        httpx.delete(f"{server.url}/v1/cache").raise_for_status()
        # The target removes them when it comes to it: room that it makes later would take new blocks.
        server.wait_for(lambda: not list((disk.place / "prefix").rglob("*.kv")), "an empty archive")
        disk.fill(server)
        assert [ask(server, prompt) for prompt in prompts] == expected
        server.wait_for(lambda: server.metric("tandem:prefix_archive_errors_total") >= 1, "the full disk counted")
        assert [ask(server, prompt) for prompt in prompts] == expected, "from the device's blocks"
        refused = respond(server)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert "store: false" in refused.json()["error"]["message"]
        assert respond(server, store=False).status_code == 200
        assert server.health() == 200
        disk.free(server)
        again = respond(server, previous_response_id=kept.json()["id"])
        assert again.status_code == 200, again.text
        assert httpx.get(f"{server.url}/v1/responses/{again.json()['id']}", timeout=60).status_code == 200
        assert {module: server.worker(module) for module in processes} == processes
        assert "Traceback" not in server.log.read_text()
