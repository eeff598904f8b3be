"""Streaming completions in threads, so that a test can do harm while they run."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import psutil

from tests.support.server import Server

BODY = {"model": "default", "prompt": "undisturbed", "max_tokens": 300, "temperature": 0, "ignore_eos": True}

READ_S = 300.0  # between two chunks: a test that disturbs the server again and again lets some streams wait long


class Stream(threading.Thread):
    """One streaming completion, read in a thread."""

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(daemon=True)
        self.server, self.body = server, {**BODY, "stream": True, **options}
        self.text, self.error = "", ""
        self.tokens: list[str] = []  # with `logprobs`
        self.num_chunks = 0
        self.status = 0
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self.server.url}/v1/completions", json=self.body, timeout=READ_S) as answer:
                self.status = answer.status_code
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            self.error = str(chunk["error"])
                        else:
                            (choice,) = chunk["choices"]
                            self.text += choice["text"]
                            self.tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
                            self.num_chunks += 1
        except httpx.HTTPError as error:
            self.error = repr(error)

    def wait_chunks(self, n: int) -> None:
        self.server.wait_for(lambda: self.num_chunks >= n or not self.is_alive(), f"{n} chunks")

    def result(self, timeout_s: float = 120.0) -> str:
        self.join(timeout_s)
        assert not self.is_alive(), "the stream does not end"
        assert not self.error, self.error
        return self.text


IN_ENGINE = ("vllm:num_requests_running", "vllm:num_requests_waiting")


def hold(server: Server) -> psutil.Process:
    """The target of an idle server, suspended: what is asked from now on cannot end before it goes on."""
    wait_in_engine(server, 0)
    target = server.worker("workers.target")
    target.suspend()
    return target


def wait_in_engine(server: Server, num_requests: int) -> None:
    server.wait_for(lambda: sum(map(server.metric, IN_ENGINE)) == num_requests, f"{num_requests} in the engine")


def held_stream(server: Server, **options: Any) -> tuple[Stream, psutil.Process]:
    """A stream that the scheduler has taken, and the target, which stands still: until it goes on no stream can end.

    A stream caught in its middle instead may be over before the test comes to run again. Nothing else may run.
    """
    target = hold(server)
    stream = Stream(server, **options)
    wait_in_engine(server, 1)
    return stream, target
