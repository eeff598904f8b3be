"""What speculation learned is there again after a restart, for the same models on the same machine alone."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scheduler import learned_files
from scheduler.learned import Learned
from shared import metric_names as names
from tests.scheduler.test_policy_simulation import LAUNCH_BOUND, WORLDS
from tests.support.speculation_world import Costs, Traffic, World

BATCH = 8
# Drafts lose there, which its calibration does not tell.
MISLEADING = WORLDS["calibration in favour of drafts"]


def beginning(costs: Costs, known: dict[str, Learned], seed: int) -> tuple[float, World]:
    """Tokens per second of the first 150 steps."""
    world = World(costs, seed=seed, known=known)
    world.set_batch(BATCH)
    return world.run(150 * costs.step_s(BATCH, 1)), world


def used(costs: Costs) -> dict[str, Learned]:
    """What a server knows after some time."""
    _, world = beginning(costs, {}, seed=1)
    world.run(1500 * costs.step_s(BATCH, 1))
    assert world.core.speculator.keep() is not None
    return world.known


@pytest.mark.parametrize("name", WORLDS)
def test_a_server_that_starts_again_begins_with_what_it_knew(name: str) -> None:
    costs, seeds = WORLDS[name], range(2, 6)
    best = max(costs.rate(BATCH, k) for k in (0, 1, 3, 7))
    known = used(costs)
    fresh = sum(beginning(costs, {}, seed)[0] for seed in seeds) / len(seeds)
    again = sum(beginning(costs, dict(known), seed)[0] for seed in seeds) / len(seeds)
    assert again >= 0.97 * best
    assert fresh < 0.96 * best, "there is something to be learned"


def test_what_holds_no_more_is_found_out() -> None:
    """Yesterday another program took the machine: all took four times as long, drafting most."""
    slow = Costs(
        step_s=lambda b, w: 4 * MISLEADING.step_s(b, w) / (3 if w > 1 else 1), draft_s=MISLEADING.draft_s,
        acceptance=0.45,
    )  # fmt: skip
    assert max((1, 3, 7), key=lambda k: slow.rate(BATCH, k)) and slow.rate(BATCH, 3) > slow.rate(BATCH, 0)
    known = used(slow)
    best = max(MISLEADING.rate(BATCH, k) for k in (0, 1, 3, 7))
    world = World(MISLEADING, seed=2, known=known)
    world.set_batch(BATCH)
    world.run(600 * MISLEADING.step_s(BATCH, 1))
    assert world.run(600 * MISLEADING.step_s(BATCH, 1)) >= 0.96 * best


def test_requests_that_come_are_known_to_cost() -> None:
    traffic = Traffic(prompt_tokens=128, output_tokens=64, prefill_s=lambda n: 2e-5 * n, catch_up_s=lambda n: 6e-5 * n)
    world = World(LAUNCH_BOUND, traffic=traffic)
    world.set_batch(BATCH)
    world.run(30.0)
    world.core.speculator.keep()
    (learned,) = world.known.values()
    assert learned.drafted_arrival_s > learned.plain_arrival_s >= 0.0
    assert {known.k for known in learned.rounds} >= {0, 7}


def test_another_machine_or_pair_of_models_begins_anew() -> None:
    world = World(MISLEADING)
    speculator = world.core.speculator
    world.set_batch(BATCH)
    world.run(1.0)
    speculator.keep()
    names = [("weights float32 GPU", "drafter"), ("weights bfloat16 GPU", "drafter"), ("weights float32 GPU", "other")]
    for target, drafter in names:
        speculator.set_target(31, [], 100, name=target)
        speculator.set_drafter("drafter", "model", 1, 7, name=drafter)
        assert speculator.policy.learned(speculator._neural, speculator._ngram) is None
    assert len(world.known) == 1


def test_a_drafter_that_comes_back_finds_what_was_learned_of_it() -> None:
    world = World(MISLEADING)
    world.set_batch(BATCH)
    world.run(5.0)
    speculator = world.core.speculator
    before = speculator.policy.round_s(BATCH, 0)
    speculator.lose_drafter()
    (name,) = [key for key in [speculator.keep()] if key is not None]
    ready = speculator._drafter_name.split(" ")
    speculator.set_drafter("drafter", ready[1], 9, int(ready[2]), name=ready[0])
    assert speculator.policy.round_s(BATCH, 0) == pytest.approx(before)
    assert name in world.known


def test_files_bring_back_what_was_kept(tmp_path: Path) -> None:
    known = used(MISLEADING)
    learned_files.save(tmp_path, known, known)
    assert learned_files.load(tmp_path) == known
    assert [path.suffix for path in (tmp_path / learned_files.FORMAT).iterdir()] == [".json"]


def test_the_oldest_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_files, "MAX_FILES", 3)
    (learned,) = used(MISLEADING).values()
    for i in range(5):
        learned_files.save(tmp_path, {f"pair {i}": learned}, [f"pair {i}"])
        for path in (tmp_path / learned_files.FORMAT).iterdir():  # a second ago
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1))
    assert sorted(learned_files.load(tmp_path)) == ["pair 2", "pair 3", "pair 4"]


def test_files_that_cannot_be_read_count_as_none(tmp_path: Path) -> None:
    known = used(MISLEADING)
    learned_files.save(tmp_path, known, known)
    (path,) = (tmp_path / learned_files.FORMAT).glob("*.json")
    whole = path.read_bytes()
    rng = random.Random(0)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert learned_files.load(tmp_path) == {}
    path.write_bytes(bytes(rng.randrange(256) for _ in range(200)))
    assert learned_files.load(tmp_path) == {}
    assert learned_files.load(tmp_path / "nowhere") == {}


def test_a_folder_that_cannot_be_written_costs_the_knowledge_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / learned_files.FORMAT).write_text("a file in the folder's place")
    known = used(MISLEADING)
    learned_files.save(tmp_path, known, known)
    assert "cannot keep what speculation learned" in caplog.text


def test_metrics_tell_what_the_policy_believes() -> None:
    world = World(MISLEADING)
    world.set_batch(BATCH)
    world.run(5.0)
    page = world.core._metrics_page().decode()
    told = {
        (int(sample.labels["rows"]), int(sample.labels["k"])): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == names.SPEC_ROUND_SECONDS
    }
    assert told[BATCH, 0] == pytest.approx(world.core.speculator.policy.round_s(BATCH, 0))
    assert set(told) == set(world.core.speculator.policy._times)
    world.core.speculator.policy.forget()
    assert f"{names.SPEC_ROUND_SECONDS}{{" not in world.core._metrics_page().decode()
