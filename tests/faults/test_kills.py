"""kill -9, SIGSTOP and SIGCONT under load: every stream gives the undisturbed tokens, and nothing is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.load import Footprint, Load, check_nothing_leaked, orphaned_shared_memory
from tests.support import tiny_model
from tests.support.server import READY_S, REPOSITORY, Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

MODULES = ("workers.target", "scheduler", "workers.drafter")
SETTINGS = {"max_num_seqs": 16, "max_early_deaths": 1000, "heartbeat_timeout_s": 3}
CONCURRENCY = 8
IS_LONG = os.environ.get("FAULTS_LONG", "") == "1"  # every case; `make test` takes the telling ones


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    drafter = {"draft_model": tiny_model.write_eagle3(folder / "eagle", model), "draft_tokens": 2} if IS_LONG else {}
    shared_memory = orphaned_shared_memory()
    with Server(model, folder, **drafter, **SETTINGS) as running:
        running.wait_for(lambda: running.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
        yield running
    if IS_LONG:  # beside other tests, whose processes come and go, nothing could be said
        assert orphaned_shared_memory() <= shared_memory
    # ZeroMQ leaves the files of its sockets; the next server of this port uses the same two.
    left = {f.name for f in running.run_dir.iterdir() if f.suffix not in (".beat", ".ready")}
    assert left <= {"engine.sock", "features.sock"}


def send(server: Server, module: str, number: signal.Signals) -> None:
    """A process that is being started again cannot be found: then it was down anyway."""
    try:
        server.worker(module).send_signal(number)
    except (AssertionError, psutil.NoSuchProcess):
        return


def test_a_kill_of_each_changes_no_token_and_leaks_nothing(server: Server) -> None:
    load = Load(server, CONCURRENCY)
    check_nothing_leaked(server)
    before = Footprint.of(server)
    with load:
        load.wait_progress()
        for victim in MODULES:
            send(server, victim, signal.SIGKILL)
            load.wait_progress()
    load.check(CONCURRENCY)
    check_nothing_leaked(server, before)


def test_all_at_once_change_no_token(server: Server) -> None:
    with Load(server, CONCURRENCY) as load:
        load.wait_progress()
        for module in MODULES:
            send(server, module, signal.SIGKILL)
        load.wait_progress()
    load.check(CONCURRENCY)
    check_nothing_leaked(server)


@pytest.mark.parametrize("module", list(MODULES) if IS_LONG else ["workers.target"])
def test_a_stopped_process_is_replaced_and_a_pause_does_no_harm(server: Server, module: str) -> None:
    with Load(server, 4) as load:
        load.wait_progress()
        paused = server.worker(module)
        paused.suspend()
        paused.resume()
        load.wait_progress()
        assert server.worker(module) == paused
        paused.suspend()
        psutil.wait_procs([paused], timeout=60)
        assert not paused.is_running() or paused.status() == psutil.STATUS_ZOMBIE, "nobody replaced it"
        load.wait_progress()
    load.check(4)
    assert "hangs; killing it" in server.log.read_text()
    check_nothing_leaked(server)


@pytest.mark.parametrize("role", ["target", "scheduler", "drafter"] if IS_LONG else ["target", "scheduler"])
def test_a_rolling_restart_changes_no_token_and_counts_as_no_death(server: Server, role: str) -> None:
    module = role if role == "scheduler" else f"workers.{role}"
    with Load(server, 4) as load:
        load.wait_progress()
        before = server.worker(module)
        command = [sys.executable, "-m", "tandem", "restart", role]
        told = subprocess.run(
            command, cwd=REPOSITORY, env=server.environment, capture_output=True, text=True, timeout=60
        )
        assert told.returncode == 0, told.stderr
        psutil.wait_procs([before], timeout=30)
        load.wait_progress()
    load.check(4)
    assert server.worker(module) != before
    assert f"{role} is started again, as it was told" in server.log.read_text()
    check_nothing_leaked(server)
