"""Connections between the processes that break in the middle of a message change no token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.apart import MODULES, Apart
from tests.faults.cable import Cable
from tests.faults.load import Load, check_nothing_leaked
from tests.faults.test_kills import IS_LONG
from tests.support import tiny_model
from tests.support.server import READY_S

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

ROUNDS = 5
RESTARTS = "tandem:worker_restarts_total"


@pytest.fixture(scope="module")
def cables(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Apart, Cable, Cable]]:
    """A server whose drafter is fed with features: (server, cable to the scheduler, cable of the features)."""
    folder = tmp_path_factory.mktemp("cut")
    eagle = tiny_model.write_eagle3(folder / "eagle", model)
    engine, features = (Cable(folder / f"{name}.cable", folder / f"{name}.sock") for name in ("engine", "features"))
    outer = {"TANDEM_ENGINE_ADDRESS": f"ipc://{folder}/engine.cable"}
    environments = {role: outer for role in MODULES if role != "scheduler"}
    environments["target"] = outer | {"TANDEM_FEATURES_ADDRESS": f"ipc://{folder}/features.cable"}
    server = Apart(
        model, folder, environments=environments, engine_address=f"ipc://{folder}/engine.sock",
        features_address=f"ipc://{folder}/features.sock", draft_model=eagle, draft_tokens=2, max_num_seqs=16,
    )  # fmt: skip
    try:
        with server:
            server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
            yield server, engine, features
    finally:
        for cable in (engine, features):
            cable.stop()


def restarts(server: Apart) -> float:
    return server.metric(RESTARTS, role="target") + server.metric(RESTARTS, role="drafter")


@pytest.mark.parametrize("which", ["engine", "features"])
def test_a_cut_in_the_middle_of_a_message_changes_no_token(cables: tuple[Apart, Cable, Cable], which: str) -> None:
    server, engine, features = cables
    cable = engine if which == "engine" else features
    processes = restarts(server)
    with Load(server, 4) as load:
        load.wait_progress()
        for _ in range(ROUNDS):
            server.wait_for(lambda: cable.num_alive, "a connection")
            before = cable.num_cuts
            cable.cut()
            server.wait_for(lambda before=before: cable.num_cuts > before, "a message cut")
            load.wait_progress(40)
        drafts = server.metric("vllm:spec_decode_num_draft_tokens_total")
        load.wait_progress(40)
        server.wait_for(
            lambda: server.metric("vllm:spec_decode_num_draft_tokens_total") > drafts, "drafts after the cuts"
        )
    load.check(4)
    assert restarts(server) == processes, "a cut is no reason to replace a process"
    check_nothing_leaked(server)
