"""kill -9, SIGSTOP and SIGCONT under load: every stream gives the undisturbed tokens, and nothing is left over."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.load import Footprint, Load, check_nothing_leaked
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

MODULES = ("workers.target", "scheduler", "workers.drafter")
SETTINGS = {"max_num_seqs": 16, "max_early_deaths": 1000, "heartbeat_timeout_s": 3}
NUM_KILLS = int(os.environ.get("FAULTS_KILLS", "6"))
CONCURRENCY = int(os.environ.get("FAULTS_CONCURRENCY", "8"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(model, tmp_path_factory.mktemp("server"), **SETTINGS) as running:
        yield running


def send(server: Server, module: str, number: signal.Signals) -> None:
    """A process that is being started again cannot be found: then it was down anyway."""
    try:
        server.worker(module).send_signal(number)
    except (AssertionError, psutil.NoSuchProcess):
        return


def test_random_kills_change_no_token_and_leak_nothing(server: Server) -> None:
    rng = random.Random(5)
    load = Load(server, CONCURRENCY)
    check_nothing_leaked(server)
    before = Footprint.of(server)
    victims = [rng.choice(MODULES) for _ in range(NUM_KILLS)] if NUM_KILLS > 6 else list(MODULES) * 2
    with load:
        load.wait_progress()
        for victim in victims:
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


@pytest.mark.parametrize("module", ["workers.target", "scheduler"])
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
