"""A request that brings the target down ends alone and says so; its neighbours and the server go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults import sick_target
from tests.faults.apart import Apart
from tests.faults.load import Load, check_nothing_leaked
from tests.faults.test_kills import IS_LONG
from tests.support.stream import BODY

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

WAIT_S = 120.0
NUM_ATTEMPTS = 2  # as docs/operations.md says


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    folder = tmp_path_factory.mktemp("sick")
    running = Apart(model, folder, {"target": "tests.faults.sick_target"}, max_num_seqs=16)
    running.environment[sick_target.FOLDER] = str(folder)
    with running:
        yield running


def folder_of(server: Apart) -> Path:
    return Path(server.environment[sick_target.FOLDER])


@pytest.mark.parametrize("word", list(sick_target.ALWAYS))
def test_a_poison_request_ends_alone_after_two_attempts(server: Apart, word: str) -> None:
    with Load(server, 4) as load:
        load.wait_progress()
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"prompt": word}, timeout=WAIT_S)
        load.wait_progress()
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert error["code"] == "poison_request" and "given up" in error["message"]
    assert answer.headers["x-should-retry"] == "false", "clients would send it again"
    assert sick_target.num_faults(folder_of(server), word) == NUM_ATTEMPTS
    load.check(4)
    check_nothing_leaked(server)
