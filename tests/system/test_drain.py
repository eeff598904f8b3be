"""SIGTERM lets live requests finish; what does not finish in time, and a second signal, end as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.test_kills import IS_LONG
from tests.support.server import REPOSITORY, STOP_S, Server
from tests.support.stream import BODY, Stream, held_stream

pytestmark = [pytest.mark.system, pytest.mark.mlx]

NUM_TOKENS = 200


def terminate_in_the_middle(server: Server) -> tuple[Stream, psutil.Process, list[psutil.Process]]:
    """SIGTERM while a stream waits for a target that stands still, so that the test need not hurry."""
    stream, target = held_stream(server, max_tokens=NUM_TOKENS, logprobs=1)
    family = server.tree()
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: "draining" in httpx.get(f"{server.url}/health").text, "draining")
    assert stream.is_alive()
    return stream, target, family


def end_of(server: Server, family: list[psutil.Process], within_s: float) -> int:
    assert server.process is not None
    code = server.process.wait(timeout=within_s)
    _, alive = psutil.wait_procs(family, timeout=2.0)
    assert not alive, f"still running: {alive}"
    return code


def test_sigterm_lets_a_stream_finish_and_takes_no_new_request(model: Path, tmp_path: Path) -> None:
    with Server(model, tmp_path) as server:
        stream, target, family = terminate_in_the_middle(server)
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "shutting down" in refused.json()["error"]["message"]
        target.resume()
        stream.result()
        assert len(stream.tokens) == NUM_TOKENS
        assert end_of(server, family, 20) == 0
        log = server.log.read_text()
        assert "Traceback" not in log
        assert not list(server.run_dir.glob("*.pid"))


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_what_does_not_finish_in_time_ends_with_a_clear_error(model: Path, tmp_path: Path) -> None:
    with Server(model, tmp_path, drain_timeout_s=1) as server:
        stream, _, family = terminate_in_the_middle(server)
        assert end_of(server, family, 1 + STOP_S) == 0
        stream.join(10)
        assert "the server is shutting down" in stream.error
        assert len(stream.tokens) < NUM_TOKENS
        assert "Traceback" not in server.log.read_text()


FRONTEND = (
    "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('is draining', flush=True)); "
    "print('is up', flush=True)\nwhile True: signal.pause()"
)
PROGRAM = """
import sys
from pathlib import Path
from tandem import processes
processes.PROCFILE = Path(sys.argv[1])
sys.exit(processes.main())
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_everything_at_once(second: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "frontend.py"
    script.write_text(FRONTEND)
    procfile = tmp_path / "Procfile"
    procfile.write_text(f"frontend: PYTHONPATH={REPOSITORY} exec {sys.executable} -m shared.supervise frontend -- "
                        f"{sys.executable} -S {script}\nother: exec sleep 100\n")  # fmt: skip
    environment = os.environ | {"TANDEM_RUN_DIR": str(tmp_path / "run"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(procfile)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        assert any("is up" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        assert any("is draining" in line for line in lines)
        assert process.poll() is None
        started = time.monotonic()
        process.send_signal(second)
        assert process.wait(timeout=STOP_S) == 0
        assert time.monotonic() - started < STOP_S
    finally:
        process.kill()
        process.communicate()
