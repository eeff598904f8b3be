"""Loading archived blocks or computing them again: whichever is sooner, and now and then the other one."""

from __future__ import annotations

import pytest

from scheduler.prefix.pace import TRY_EVERY, ArchivePace
from shared.messages import StepCost
from tests.scheduler.test_core import Rig
from tests.scheduler.test_prefix import cache_info, restarted_after
from tests.support.fake_target import greedy, worker_info


def test_blocks_are_loaded_until_both_times_are_known() -> None:
    pace = ArchivePace()
    assert pace.num_worth(100, 3200) == 100
    pace.loaded(100, 1.0)
    assert pace.num_worth(100, 3200) == 100
    pace.computed(64, 0.001)  # a step of few tokens says nothing of a prompt's
    assert pace.num_worth(100, 3200) == 100


def test_a_fast_target_tries_a_disk_with_few_blocks_first() -> None:
    """8B shape on an H200 behind a slow disk: a first request waited 4.5 s for what it computes in 0.14."""
    block_bytes, block_s = 4 << 20, 4.4 / 124
    pace = ArchivePace(token_s=0.14 / 3968, block_bytes=block_bytes)
    first = pace.num_worth(124, 3968)
    assert first >= 1
    assert first * block_s < 0.3
    pace.loaded(first, first * block_s)
    assert pace.num_worth(124, 3968) == 0
    fast = ArchivePace(token_s=0.14 / 3968, block_bytes=block_bytes)
    fast.loaded(first, first * block_bytes / 3e9)
    assert fast.num_worth(124, 3968) == 124


def test_a_slow_target_loads_all_at_once() -> None:
    assert ArchivePace(token_s=0.007, block_bytes=1 << 20).num_worth(124, 3968) == 124


def measured(compute_s: float, load_s: float) -> ArchivePace:
    """A prompt of 4,000 tokens took so long to compute, its 125 blocks so long to load."""
    pace = ArchivePace()
    pace.computed(4000, compute_s)
    pace.loaded(125, load_s)
    return pace


GPU = (0.17, 1.1)  # an 8B shape on an H200, from SSD
CPU = (31.0, 1.7)  # the embedded model on two cores


def test_what_is_computed_sooner_is_not_loaded() -> None:
    assert measured(*GPU).num_worth(124, 3968) == 0
    assert measured(*CPU).num_worth(124, 3968) == 124


def test_few_blocks_that_save_many_tokens_are_loaded() -> None:
    """Behind blocks that are missing lie others that are there."""
    assert measured(*GPU).num_worth(8, 3968) == 8


def test_a_load_that_became_fast_is_noticed() -> None:
    pace = measured(*GPU)
    tried = [pace.num_worth(124, 3968) for _ in range(2 * TRY_EVERY)]
    assert [i for i, n in enumerate(tried, 1) if n] == [TRY_EVERY, 2 * TRY_EVERY]
    assert max(tried) < 124 / 4, "what does not pay is tried with a part"
    pace.loaded(125, 0.05)
    assert pace.num_worth(124, 3968) == 124


def test_a_first_step_that_compiled_kernels_is_forgotten() -> None:
    pace = measured(35.0, 1.1)
    assert pace.num_worth(124, 3968) == 124
    pace.computed(1024, 0.04)
    assert pace.num_worth(124, 3968) == 0


def test_a_request_computes_what_the_archive_would_give_too_late() -> None:
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1]
    chats = restarted_after(prompt)
    prefix = chats.core.session.prefix
    prefix.pace.token_s, prefix.pace.block_s = 1e-4, 1.0
    chats.submit("b", prompt, 2)
    chats.drain()
    assert chats.tokens("b") == greedy(prompt, 2)
    assert chats.outputs["b"][-1].timings.num_cached_tokens == 0
    assert prefix.counts.misses["slow_archive"] == 1


@pytest.mark.parametrize(("kind", "num_cached"), [("full", 4), ("recurrent", 8)])
def test_the_first_load_brings_few_blocks_and_the_rest_is_computed(kind: str, num_cached: int) -> None:
    """Of a recurrent model as many as a state needs: here there is one at the prompt's end."""
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1]
    chats = restarted_after(prompt, kind)
    prefix = chats.core.session.prefix
    prefix.pace = ArchivePace(token_s=1e-4, block_bytes=1 << 20)
    chats.submit("b", prompt, 2)
    chats.drain()
    assert chats.tokens("b") == greedy(prompt, 2)
    assert chats.outputs["b"][-1].timings.num_cached_tokens == num_cached
    assert prefix.counts.misses["slow_archive"] == 1
    chats.core.check_integrity()


def test_a_target_that_measured_wide_steps_tells_what_computing_takes() -> None:
    costs = [StepCost(batch=1, width=1, seconds=0.005), StepCost(batch=32, width=8, seconds=0.01)]
    rig = Rig(worker_info(step_costs=costs, prefix_cache=cache_info(), max_draft_tokens=4))
    rig.start_target()
    prefix = rig.core.session.prefix
    assert prefix.pace.token_s == 0.01 / 256
    prefix.pace.loaded(125, 0.8)
    assert prefix.pace.num_worth(124, 3968) == 0
