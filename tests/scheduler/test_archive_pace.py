"""Loading archived blocks or computing them again: whichever is sooner, and now and then the other one."""

from __future__ import annotations

from scheduler.prefix.pace import TRY_EVERY, ArchivePace
from shared.messages import ArchivedBlock, BlocksArchived
from tests.scheduler.test_prefix import rig
from tests.support.fake_target import greedy


def test_blocks_are_loaded_until_both_times_are_known() -> None:
    pace = ArchivePace()
    assert pace.is_worth(100, 3200)
    pace.loaded(100, 1.0)
    assert pace.is_worth(100, 3200)
    pace.computed(64, 0.001)  # a step of few tokens says nothing of a prompt's
    assert pace.is_worth(100, 3200)


def test_what_a_gpu_computes_sooner_than_the_disk_reads_is_computed() -> None:
    """An 8B shape on an H200: 4,000 tokens take 0.17 s, their half gigabyte 1.1 s from SSD."""
    pace = ArchivePace()
    pace.computed(4000, 0.17)
    pace.loaded(125, 1.1)
    assert not pace.is_worth(124, 3968)


def test_what_a_cpu_computes_is_loaded() -> None:
    """The embedded model on two cores: 31 s against 1.7."""
    pace = ArchivePace()
    pace.computed(4000, 31.0)
    pace.loaded(125, 1.7)
    assert pace.is_worth(124, 3968)


def test_few_blocks_that_save_many_tokens_are_loaded() -> None:
    """Behind blocks that are missing lie others that are there."""
    pace = ArchivePace()
    pace.computed(4000, 0.17)
    pace.loaded(125, 1.1)
    assert pace.is_worth(8, 3968)


def test_a_load_that_became_fast_is_noticed() -> None:
    pace = ArchivePace()
    pace.computed(4000, 0.17)
    pace.loaded(125, 1.1)
    tried = [pace.is_worth(124, 3968) for _ in range(2 * TRY_EVERY)]
    assert sum(tried) == 2
    pace.loaded(125, 0.05)
    assert pace.is_worth(124, 3968)


def test_a_first_step_that_compiled_kernels_is_forgotten() -> None:
    pace = ArchivePace()
    pace.computed(1024, 9.0)
    pace.computed(1024, 0.04)
    pace.loaded(125, 1.1)
    assert not pace.is_worth(124, 3968)


def test_a_request_computes_what_the_archive_would_give_too_late() -> None:
    chats = rig()
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1]
    chats.submit("a", prompt, 2)
    chats.drain()
    archive = chats.target.archive
    chats.start_target()
    chats.target.archive = archive
    added = [ArchivedBlock(block_hash=h, has_window=b.has_window, has_state=False) for h, (b, _) in archive.items()]
    chats.send(chats.target_id, BlocksArchived(epoch=chats.epoch, added=added))
    prefix = chats.core.session.prefix
    prefix.pace.token_s, prefix.pace.block_s = 1e-4, 1.0
    chats.submit("b", prompt, 2)
    chats.drain()
    assert chats.tokens("b") == greedy(prompt, 2)
    assert chats.outputs["b"][-1].timings.num_cached_tokens == 0
    assert prefix.counts.misses["slow_archive"] == 1
