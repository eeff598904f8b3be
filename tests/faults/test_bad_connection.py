"""Messages that are repeated, swapped, delayed or lost between the processes change no token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.apart import Apart
from tests.faults.load import Load
from tests.faults.proxy import Faults, Proxy
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

RESTARTS = "tandem:worker_restarts_total"
FAULTS = ("repeated", "swapped", "delayed", "lost")
MAX_ROUNDS = 60
ANY_LOSS = Faults(repeat=0.02, swap=0.01, delay=0.02, lose=0.01)


@pytest.fixture
def connection(model: Path, tmp_path: Path) -> Iterator[tuple[Server, Proxy]]:
    """The four processes, with the proxy in the place of the scheduler for all others."""
    inner = tmp_path / "inner"
    inner.mkdir()
    server = Apart(
        model, tmp_path, environments={"scheduler": {"TANDEM_RUN_DIR": str(inner)}}, max_num_seqs=16,
        heartbeat_timeout_s=3, prefix_ssd_bytes=0,
    )  # fmt: skip
    server.run_dir.mkdir()
    proxy = Proxy(server.run_dir, inner)
    try:
        with server:
            yield server, proxy
    finally:
        proxy.stop()


def test_messages_that_are_repeated_swapped_delayed_or_lost_change_no_token(connection: tuple[Server, Proxy]) -> None:
    server, proxy = connection
    load = Load(server, 6, num_tokens=50)
    restarts = server.metric(RESTARTS, role="target")
    with load:
        proxy.faults = ANY_LOSS
        for num_rounds in itertools.count(1):
            load.wait_progress(40)
            num_gaps = server.metric("tandem:resynchronisations_total", role="target")
            if num_rounds >= 12 and num_gaps >= 2 and all(proxy.counts[fault] for fault in FAULTS):
                break
            assert num_rounds < MAX_ROUNDS, f"no gap was noticed: {proxy.counts}"
        proxy.faults = Faults()
    load.check(6)
    assert server.metric(RESTARTS, role="target") == restarts, "a lost message is no reason to replace a process"
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "idle")
    assert server.metric("vllm:kv_cache_usage_perc") == 0
