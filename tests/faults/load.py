"""Streams that go on and on while a test does harm, each checked against the undisturbed tokens."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import Server
from tests.support.stream import BODY, Stream

WAIT_S = 90.0
STREAM_S = 600.0  # of one stream while processes are killed all the time
REFUSED = (429, 503)


@dataclass(frozen=True)
class Kind:
    """One request of the load. With `logprobs` each token is compared, without them the text."""

    options: tuple[tuple[str, Any], ...]

    def start(self, server: Server) -> Stream:
        return Stream(server, **dict(self.options))


def kinds(num_tokens: int) -> list[Kind]:
    """Greedy and seeded sampling, with and without log-probabilities, short and long prompts."""
    result = []
    for i, prompt in enumerate(("undisturbed", "x", "a longer prompt " * 8, "another one")):
        base = {"prompt": prompt, "max_tokens": num_tokens + 7 * i}
        sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 11 + i}
        result += [base | {"logprobs": 1}, base | sampled | {"logprobs": 1}, base, base | sampled]
    return [Kind(tuple(options.items())) for options in result]


def outcome(stream: Stream) -> tuple[str, list[str]]:
    stream.result(STREAM_S)
    return stream.text, stream.tokens


class Load:
    """`concurrency` threads that each run one stream after the other until `stop`.

    Use as a context manager; leaving it waits for the streams that run and checks every one.
    """

    def __init__(self, server: Server, concurrency: int, num_tokens: int = 60, abandoned: float = 0.0) -> None:
        self.server = server
        self.abandoned = abandoned  # share of requests whose client leaves half-way
        self.num_abandoned = 0
        self._random = random.Random(3)
        self.kinds = kinds(num_tokens)
        self.expected = {kind: outcome(kind.start(server)) for kind in self.kinds}
        self.num_finished = 0
        self.failures: list[str] = []
        self._running: dict[int, Stream] = {}
        self._concurrency = concurrency
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self._concurrency)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(STREAM_S)
        assert not any(t.is_alive() for t in self._threads), "a stream does not end"

    def _run(self, i: int) -> None:
        turn = i
        while not self._stopped.is_set():
            kind = self.kinds[turn % len(self.kinds)]
            turn += 1
            if self._random.random() < self.abandoned:
                self._abandon(kind)
                continue
            stream = self._running[i] = kind.start(self.server)
            try:
                got: object = outcome(stream)
            except AssertionError as error:
                got = str(error)
            if stream.status in REFUSED:  # never accepted, and said so at once: try again
                turn -= 1
                self._stopped.wait(0.2)
                continue
            with self._lock:
                self.num_finished += 1
                if got != self.expected[kind]:
                    self.failures.append(f"{dict(kind.options)}: {str(got)[:300]}")

    def _abandon(self, kind: Kind) -> None:
        """Leave after a few chunks, or before the first."""
        num_chunks = self._random.randrange(6)
        body = {**BODY, **dict(kind.options), "stream": True}
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=WAIT_S) as answer:
            for _ in zip(range(num_chunks), answer.iter_lines(), strict=False):
                pass
        with self._lock:
            self.num_abandoned += 1

    def wait_progress(self, num_chunks: int = 8, timeout_s: float = WAIT_S) -> float:
        """Until the streams have got so many more chunks; the seconds it took."""
        started = time.monotonic()
        last, gained = self._seen(), 0
        while gained < num_chunks:
            assert time.monotonic() - started < timeout_s, f"no progress:\n{self.server.log.read_text()[-3000:]}"
            time.sleep(0.02)
            now = self._seen()
            gained += sum(max(0, n - last.get(stream, 0)) for stream, n in now.items())
            last = now
        return time.monotonic() - started

    def _seen(self) -> dict[Stream, int]:
        return {stream: stream.num_chunks for stream in list(self._running.values())}

    def check(self, min_finished: int = 1) -> None:
        assert not self.failures, f"{len(self.failures)} of {self.num_finished} streams: {self.failures[:3]}"
        assert self.num_finished >= min_finished


def check_nothing_leaked(server: Server, before: Footprint | None = None) -> None:
    """All is idle and free; with `before`, the frontend's files, the processes and the run folder are as they were."""
    server.wait_ready()
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "idle")
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    if before is not None:
        server.wait_for(lambda: Footprint.of(server) == before, f"{before} again, not {Footprint.of(server)}")


def orphaned_shared_memory() -> set[str]:
    """Files of /dev/shm that no living process has mapped or open (Linux): what a killed one would leave."""
    held: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held |= {line.split()[-1] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line}
            held |= {str(link.readlink()) for link in (process / "fd").iterdir()}
    return {str(path) for path in Path("/dev/shm").glob("*")} - held


@dataclass(frozen=True)
class Footprint:
    num_processes: int
    zombies: tuple[int, ...]
    run_files: tuple[str, ...]
    torn_files: tuple[str, ...]  # of cached blocks
    frontend_files: int

    @classmethod
    def of(cls, server: Server) -> Footprint:
        family = server.tree()
        zombies = tuple(p.pid for p in family if p.status() == "zombie")
        files = tuple(sorted(f.name for f in server.run_dir.iterdir()))
        torn = tuple(sorted(f.name for f in Path(server.environment["TANDEM_PREFIX_DIR"]).glob("*/.*")))
        return cls(len(family), zombies, files, torn, server.worker("frontend").num_fds())
