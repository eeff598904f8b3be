"""The real process tree, started as a user starts it, for tests: own port, run folder and cache folder."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent.parent
READY_S = 90.0
STOP_S = 6.0  # the promise is 5 s; the rest is for a busy machine to notice


def free_port() -> int:
    """A port for a server that binds it later, when its process is up.

    Below the range that the system takes the ports of outgoing connections and of `bind(("", 0))` from, so that none of
    the many connections of tests beside this one can be given it meanwhile; at random, so that two tests rarely meet.
    """
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Server:
    """`Server(model, tmp).start()`; settings go in as keywords (`max_num_seqs=4` is TANDEM_MAX_NUM_SEQS)."""

    def __init__(self, model: Path | str, folder: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.run_dir = folder / f"run-{self.port}"
        self.log = folder / f"server-{self.port}.log"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
        values = {
            "model": str(model),
            "port": self.port,
            "run_dir": self.run_dir,
            "responses_file": folder / f"responses-{self.port}.sqlite3",
            "heartbeat_interval_s": 0.3,
            "prefix_dir": folder / "prefix",
            "blas_threads": 1,  # tests run beside other work, where two threads that wait for each other are slow
            **settings,
        }
        self.environment = {
            **inherited,
            **{f"TANDEM_{k.upper()}": str(v) for k, v in values.items()},
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tandem", "serve", "--config", os.devnull],
                cwd=REPOSITORY, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.stop()
                raise
        return self

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def openai(self, **options: object) -> openai.OpenAI:
        """A client of the server, to be closed; it does not try again by itself."""
        given: dict[str, object] = {"api_key": "none", "max_retries": 0, "timeout": 120, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)  # type: ignore[arg-type]  # a test's own keywords

    def health(self) -> int:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code
        except httpx.HTTPError:
            return 0

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        self.wait_for(lambda: self.health() == 200, "ready", timeout_s)

    def wait_for(self, condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
        """Ask until `condition` holds: a state of other processes, which only they can tell."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"not {what} within {timeout_s} s:\n{self.log.read_text()[-3000:]}")

    def worker(self, module: str) -> psutil.Process:
        """The process that runs `python -m MODULE` (not its supervisor)."""
        for child in self.tree():
            command = child.cmdline()
            if command[-2:] == ["-m", module] and "shared.supervise" not in command:
                return child
        raise AssertionError(f"{module} does not run")

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def stop(self) -> int:
        """SIGINT, as Ctrl-C; everything must be gone within STOP_S. Returns the exit code."""
        assert self.process is not None
        if self.process.poll() is not None:
            return self.process.returncode
        family = self.tree()
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(timeout=STOP_S)
            _, alive = psutil.wait_procs(family, timeout=2.0)
        finally:
            for process in family:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
        assert not alive, f"still running: {alive}"
        return code
