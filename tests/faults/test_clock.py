"""Wall clocks jump; durations, time-outs and liveness do not notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.load import Load, check_nothing_leaked
from tests.faults.test_kills import IS_LONG, MODULES
from tests.support.server import REPOSITORY, Server
from tests.support.stream import BODY

pytestmark = [pytest.mark.system, pytest.mark.mlx]

DAY_S = 86400.0
PACKAGES = ("frontend", "scheduler", "shared", "tandem", "workers")
WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
# What is shown to users, or compared with times that outlive a process.
ALLOWED = {
    "frontend/answer.py", "frontend/service.py", "frontend/chat_template.py", "frontend/responses/compact.py",
    "frontend/responses/run.py", "frontend/responses/store.py", "frontend/tracing.py", "scheduler/metrics.py",
    "workers/cache/archive.py",
}  # fmt: skip
# Read by each process as it starts: its wall clock is off by what stands in the file.
SITECUSTOMIZE = """
import time
_real, _path = time.time, {path!r}
def _jumping():
    with open(_path) as file:
        return _real() + float(file.read() or 0)
time.time = _jumping
time.time_ns = lambda: int(_jumping() * 1e9)
"""


def test_only_what_is_shown_or_kept_reads_a_wall_clock() -> None:
    readers = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and (node.value.id, node.attr) in WALL_CLOCKS
                ):
                    readers.add(str(path.relative_to(REPOSITORY)))
    assert readers == ALLOWED


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    offset = tmp_path / "offset"
    offset.write_text("0")
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE.format(path=str(offset)))
    return offset


@pytest.fixture
def server(model: Path, clock: Path, tmp_path: Path) -> Iterator[Server]:
    made = Server(model, tmp_path, max_num_seqs=16, heartbeat_timeout_s=3)
    made.environment["PYTHONPATH"] = f"{clock.parent / 'site'}:{made.environment['PYTHONPATH']}"
    with made as running:
        yield running


def set_clock(clock: Path, offset_s: float) -> None:
    temporary = clock.with_suffix(".new")
    temporary.write_text(str(offset_s))
    temporary.replace(clock)


def created(server: Server) -> int:
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 2}, timeout=60).json()
    return int(answer["created"])


@pytest.mark.skipif(not IS_LONG, reason="make faults runs it")
def test_clocks_that_jump_by_days_disturb_nothing(server: Server, clock: Path) -> None:
    processes = {module: server.worker(module) for module in ("frontend", *MODULES)}
    first = created(server)
    with Load(server, 4) as load:
        for jump_s in (DAY_S, -DAY_S, 400 * DAY_S, 0.0):
            set_clock(clock, jump_s)
            load.wait_progress(40)
            assert abs(created(server) - first - jump_s) < DAY_S / 2, "the jump is seen where it may be"
    load.check(4)
    assert {module: server.worker(module) for module in processes} == processes
    assert server.metric("tandem:resynchronisations_total") == 0
    check_nothing_leaked(server)
