"""Starting in any order, stopping in time, and refusing to start."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scheduler import learned_files
from tests.support.server import REPOSITORY, STOP_S, Server
from tests.support.stream import Stream

pytestmark = [pytest.mark.system, pytest.mark.mlx]

ORDERS = (
    ("frontend", "scheduler", "workers.target", "workers.drafter"),
    ("workers.drafter", "workers.target", "scheduler", "frontend"),
    ("scheduler", "workers.drafter", "frontend", "workers.target"),
    ("workers.target", "frontend", "workers.drafter", "scheduler"),
)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_the_order_of_starting_does_not_matter(order: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for module in order:
            with server.log.open("ab") as log:
                command = [sys.executable, "-m", module]
                started.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=server.environment, stdout=log, stderr=log)
                )
            time.sleep(0.3)  # apart, so that the order is what it says; nothing waits for this
        server.wait_ready()
        assert Stream(server, max_tokens=8).result()
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        codes = [end(process) for process in started]
    assert "Traceback" not in server.log.read_text()
    assert codes == [0, 0, 0, 0]


def end(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def test_ctrl_c_stops_everything_cleanly_and_in_time(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path).start()
    stream = Stream(server, max_tokens=450)
    stream.wait_chunks(3)
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < STOP_S
    assert "Traceback" not in server.log.read_text()
    assert "Tandem is ready on " in server.log.read_text()
    assert not list(server.run_dir.glob("*.lock"))


def test_a_model_that_cannot_be_loaded_ends_the_tree_with_a_clear_message(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    server = Server(broken, tmp_path).start(wait=False)
    assert server.process is not None
    assert server.process.wait(timeout=60) != 0
    log = server.log.read_text()
    assert "target:" in log and "model.safetensors" in log
    assert "Traceback" not in log


def test_a_misspelt_setting_stops_start_up(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path, max_num_seq=4).start(wait=False)
    assert server.process is not None
    assert server.process.wait(timeout=30) == 78
    assert "TANDEM_MAX_NUM_SEQ" in server.log.read_text()


def test_what_speculation_learned_is_there_after_a_restart(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with Server(model, tmp_path, draft_model="ngram", cache_dir=cache) as server:
        assert Stream(server, max_tokens=60).result()
    (path,) = (cache / learned_files.FORMAT).iterdir()
    known, written = learned_files.load(cache), path.stat().st_mtime_ns
    with Server(model, tmp_path, draft_model="ngram", cache_dir=cache):
        pass  # what it writes at its end is what it began with
    assert list((cache / learned_files.FORMAT).iterdir()) == [path]
    assert path.stat().st_mtime_ns > written
    (before,), (after,) = known.values(), learned_files.load(cache).values()
    assert {(r.size, r.k): r.seconds for r in before.rounds} == {(r.size, r.k): r.seconds for r in after.rounds}
