"""The prefix cache in the scheduler: random chats against a fake target that checks every block it restores."""

from __future__ import annotations

import random
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefix.hashing import chain_seed, extend_chain
from scheduler.prefix.index import PrefixIndex
from scheduler.session import NEWS_TIMEOUT_S
from shared.messages import ArchivedBlock, BlocksArchived, Cancel, LoadBlocks, PrefixCacheInfo, RequestId, Step
from tests.scheduler.test_core import Rig
from tests.support.fake_target import greedy, worker_info

SIZE = 4
KINDS = {
    "full": {},
    "sliding": {"window": 6, "ring_tokens": 24},
    "recurrent": {"is_recurrent": True, "num_states": 3},
    "shared": {"is_shared": True},
}


def cache_info(kind: str = "full", num_blocks: int = 12) -> PrefixCacheInfo:
    return PrefixCacheInfo(block_size=SIZE, num_blocks=num_blocks, block_bytes=1, **KINDS[kind])  # type: ignore[arg-type]


def rig(kind: str = "full", num_blocks: int = 12, **changes: object) -> Rig:
    made = Rig(worker_info(prefix_cache=cache_info(kind, num_blocks), max_draft_tokens=4), **changes)
    made.start_target()
    return made


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_next_turn_of_a_chat_restores_prompt_and_answer(kind: str) -> None:
    chat = rig(kind)
    chat.submit("first", [0, 1, 2, 0, 1, 1, 2, 2, 0], 9)
    chat.drain()
    history = [0, 1, 2, 0, 1, 1, 2, 2, 0, *chat.tokens("first")]
    chat.submit("second", [*history, 1], 4)
    chat.drain()
    assert chat.tokens("second") == greedy([*history, 1], 4)
    timings = chat.outputs["second"][-1].timings
    assert timings is not None
    # 17 of the 18 tokens have keys and values: 4 blocks. A recurrent model has a state at its prompt's last border.
    assert timings.num_cached_tokens == (8 if kind == "recurrent" else 16)


def test_requests_that_arrive_together_compute_a_shared_prefix_once() -> None:
    together = rig(num_blocks=30)
    prefix = [random.Random(1).randrange(3) for _ in range(24)]
    for i in range(3):
        together.submit(f"r{i}", [*prefix, i], 3)
    num_computed = 0
    while together.queue:
        message = together.queue[0]
        num_computed += sum(len(r.token_ids or []) for r in getattr(message, "prefills", []))
        together.work()
    assert num_computed <= len(prefix) + 3 * SIZE, "a prefix was computed more than once"
    assert [together.tokens(f"r{i}") for i in range(3)] == [greedy([*prefix, i], 3) for i in range(3)]


@pytest.mark.parametrize(("kind", "num_together"), [("full", 2), ("shared", 6)])
def test_a_shared_prefix_is_charged_once_where_blocks_are_referred_to(kind: str, num_together: int) -> None:
    """Slots for 80 tokens: two sequences of 32, or many that have 24 of their 32 in common."""
    cache = cache_info(kind, num_blocks=30)
    agents = Rig(
        worker_info(prefix_cache=cache, num_slots=8, kv_capacity_tokens=80, max_model_len=32, capacity_classes=[32])
    )
    agents.start_target()
    prefix = [random.Random(1).randrange(3) for _ in range(24)]
    agents.submit("first", [*prefix, 0], 1)
    agents.drain()
    for i in range(6):
        agents.submit(f"r{i}", [*prefix, i % 3, i // 3], 6)
    most = 0
    while agents.queue:
        most = max(most, len(agents.core.running))
        agents.work()
    assert most == num_together
    assert [agents.tokens(f"r{i}") for i in range(6)] == [greedy([*prefix, i % 3, i // 3], 6) for i in range(6)]
    session = agents.core.session
    assert session is not None and session.slots.used_tokens == 0
    assert session.prefix is not None
    assert all(entry.num_pins == 0 for entry in session.prefix.index.chain(list(session.prefix.index._entries), 100))


def test_one_that_waits_for_a_prefix_goes_on_when_its_computer_is_cancelled() -> None:
    waiting = rig(num_blocks=30)
    prefix = [random.Random(1).randrange(3) for _ in range(24)]
    waiting.submit("a", [*prefix, 0], 3)
    waiting.submit("b", [*prefix, 1], 3)
    waiting.send("front", Cancel(request_id=RequestId("a")))
    waiting.drain()
    assert waiting.tokens("b") == greedy([*prefix, 1], 3)


def test_tenants_never_share_blocks() -> None:
    tenants = rig()
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0]
    tenants.submit("a", prompt, 2, tenant="one")
    tenants.drain()
    tenants.submit("b", prompt, 2, tenant="two")
    tenants.submit("c", prompt, 2, tenant="one")
    tenants.drain()
    cached = {name: tenants.outputs[name][-1].timings.num_cached_tokens for name in "bc"}  # type: ignore[union-attr]
    assert cached == {"b": 0, "c": 8}


def test_a_media_segment_keeps_everything_before_it() -> None:
    tokens = list(range(40))
    plain: list[bytes] = []
    one: list[bytes] = []
    other: list[bytes] = []
    seed = chain_seed("model", "", SIZE)
    extend_chain(plain, seed, tokens, 10, SIZE)
    extend_chain(one, seed, tokens, 10, SIZE, [(13, 6, b"one image")])
    extend_chain(other, seed, tokens, 10, SIZE, [(13, 6, b"another image")])
    assert plain[:3] == one[:3] == other[:3]
    assert all(len({a, b, c}) == 3 for a, b, c in zip(plain[3:], one[3:], other[3:], strict=True))


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(sorted(KINDS)),
    num_blocks=st.integers(3, 24),
    ngram=st.booleans(),
    archives=st.booleans(),
)
def test_random_chats_give_the_same_tokens_as_without_a_cache(
    seed: int, kind: str, num_blocks: int, ngram: bool, archives: bool
) -> None:
    rng = random.Random(seed)
    changes = {"max_num_batched_tokens": rng.choice((5, 16)), "prefix_check_rate": rng.choice((0.0, 1.0))}
    chats = rig(kind, num_blocks, ngram=ngram, **changes)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(1, 14))] for _ in range(2)]  # shared beginnings
    archive = chats.target.archive
    wanted: dict[str, list[int]] = {}
    cancelled = set()
    for i in range(rng.randrange(3, 14)):
        text = list(rng.choice(texts))
        if rng.random() < 0.3 and len(text) > 2:
            text[rng.randrange(len(text))] = rng.randrange(3)  # an edit in the middle
        prompt = [*text, *(rng.randrange(3) for _ in range(rng.randrange(1, 6)))][:44]
        num_tokens = rng.randrange(1, 14)
        name = f"r{i}"
        chats.submit(name, prompt, num_tokens, priority=rng.randrange(2))
        wanted[name] = greedy(prompt, num_tokens)
        for _ in range(rng.randrange(8)):
            chats.work()
        if rng.random() < 0.2:
            cancelled.add(name)
            chats.send("front", Cancel(request_id=RequestId(name)))
        elif rng.random() < 0.5:
            texts.append([*prompt, *wanted[name]][:40])  # the next turn of this chat
        if archives and rng.random() < 0.3:
            if rng.random() < 0.3 and archive:
                del archive[rng.choice(sorted(archive))]  # a file is torn or gone: the load finds out
            added = [
                ArchivedBlock(block_hash=h, has_window=b.has_window, has_state=s is not None)
                for h, (b, s) in archive.items()
            ]
            if rng.random() < 0.3:
                chats.start_target()  # the old one died
                chats.target.archive = archive
            chats.send(chats.target_id, BlocksArchived(epoch=chats.epoch, added=added))
    chats.drain()
    for name in wanted.keys() - cancelled:
        assert chats.tokens(name) == wanted[name], name
        assert len(chats.finish_reasons(name)) == 1
    chats.assert_idle()


def restarted_after(prompt: list[int], kind: str = "full") -> Rig:
    """The target was restarted after a request with `prompt`: its blocks are in the archive only."""
    chats = rig(kind)
    chats.submit("a", prompt, 2)
    chats.drain()
    archive = chats.target.archive
    chats.start_target()
    chats.target.archive = archive
    added = [
        ArchivedBlock(block_hash=name, has_window=block.has_window, has_state=state is not None)
        for name, (block, state) in archive.items()
    ]
    chats.send(chats.target_id, BlocksArchived(epoch=chats.epoch, added=added))
    return chats


def test_blocks_in_the_archive_are_loaded_after_a_restart_of_the_target() -> None:
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1]
    chats = restarted_after(prompt)
    chats.submit("b", prompt, 2)
    chats.drain()
    assert chats.tokens("b") == greedy(prompt, 2)
    assert chats.outputs["b"][-1].timings.num_cached_tokens == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_running_request_takes_its_prompt_from_the_archive_of_the_next_target(is_lost: bool) -> None:
    """Though its Ready comes before the list of what is archived; a list that was lost is not waited for in vain."""
    chats = rig()
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1]
    chats.submit("a", prompt, 6)
    for _ in range(5):
        chats.work()
    archive = dict(chats.target.archive)
    assert len(archive) >= 2 and not chats.finish_reasons("a")
    chats.info = worker_info(
        prefix_cache=msgspec.structs.replace(cache_info(), num_archived=len(archive)), max_draft_tokens=4
    )
    chats.start_target()
    chats.target.archive = archive
    assert not chats.queue, "it computes what the archive may hold"
    if is_lost:
        chats.now += NEWS_TIMEOUT_S
        chats.deliver(chats.core.tick(chats.now))
    else:
        added = [ArchivedBlock(block_hash=h, has_window=True, has_state=False) for h in archive]
        chats.send(chats.target_id, BlocksArchived(epoch=chats.epoch, added=added))
    assert isinstance(chats.queue[0], Step if is_lost else LoadBlocks)
    chats.drain()
    assert chats.tokens("a") == greedy(prompt, 6)
    chats.assert_idle()


def test_the_index_keeps_its_books_over_100_000_random_operations() -> None:
    rng = random.Random(3)
    index = PrefixIndex(num_blocks=40, num_states=5)
    names = [bytes([i]) * 16 for i in range(100)]
    pinned = []
    lent = []
    for step in range(100_000):
        name = rng.choice(names)
        entry = index.get(name)
        match rng.randrange(9):
            case 0 | 1 | 2 if entry is None or entry.block_id is None:
                index.insert(name, rng.random() < 0.5)
            case 3:
                index.touch(rng.sample(names, 3))
            case 4 if entry is not None and len(pinned) < 30:
                index.pin([entry])
                pinned.append(entry)
            case 5 if pinned:
                index.unpin([pinned.pop(rng.randrange(len(pinned)))])
            case 6:
                index.archived(name, True, False) if rng.random() < 0.5 else index.unarchived(name)
            case 7 if rng.random() < 0.2:
                index.discard(name)
            case 8:
                if lent and rng.random() < 0.5:
                    if entry is not None and entry.block_id is not None:
                        index.attach_state(entry, lent.pop())
                    else:
                        index.return_state(lent.pop())
                elif len(lent) < 3 and (state := index.lend_state()) is not None:
                    lent.append(state)
        if step % 50 == 0:
            index.check_integrity()
    index.unpin(pinned)
    index.clear()
    index.check_integrity()
    assert index.num_resident == 0


def test_a_lookup_and_an_insert_take_microseconds_per_block() -> None:
    """The stated limit is 20 us a block; ten times that here, since the machine may be busy."""
    index = PrefixIndex(num_blocks=4000, num_states=0)
    tokens = [i % 50_000 for i in range(32 * 3000)]
    started = time.perf_counter()
    hashes: list[bytes] = []
    extend_chain(hashes, b"seed", tokens, 3000, 32)
    for name in hashes:
        index.insert(name, True)
    found = index.chain(hashes, 3000)
    index.touch(hashes)
    assert (time.perf_counter() - started) / 3000 < 200e-6
    assert len(found) == 3000


def test_an_idle_target_checks_hits_and_drops_what_differs() -> None:
    chats = rig(prefix_check_rate=1.0)
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0]
    for name in "ab":
        chats.submit(name, prompt, 2)
        chats.drain()
    counts = chats.core.metrics.prefix
    assert counts.checks == {"equal": 2, "different": 0}
    chats.submit("c", prompt, 2)
    while chats.finish_reasons("c") != ["length"]:
        chats.work()
    second = chats.target.blocks[1]
    second.tokens[5] = 1 - second.tokens[5]  # the device forgot a bit
    chats.drain()
    assert counts.checks["different"] == 1
    chats.submit("d", prompt, 2)
    chats.drain()
    timings = chats.outputs["d"][-1].timings
    assert timings is not None
    assert timings.num_cached_tokens == 4, "the block that differs is gone, the one before it is not"
    chats.assert_idle()


def test_a_check_gives_way_to_a_request() -> None:
    chats = rig(prefix_check_rate=1.0, max_num_batched_tokens=4)
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 1, 2, 0, 0]
    for name in "ab":
        chats.submit(name, prompt, 2)
        while not chats.finish_reasons(name):
            chats.work()
    assert chats.session._check is not None
    chats.submit("c", [1, 1], 3)
    assert chats.session._check is None
    chats.drain()
    assert chats.tokens("c") == greedy([1, 1], 3)
    assert chats.core.metrics.prefix.checks == {"equal": 0, "different": 0}
    chats.assert_idle()


def test_a_target_that_forgets_blocks_is_noticed() -> None:
    """The fake target's own check: a block with other tokens does not pass."""
    chats = rig()
    chats.submit("a", [0, 1, 2, 0, 1, 1, 2, 2, 0], 2)
    chats.drain()
    for block in chats.target.blocks.values():
        block.tokens[0] = 1 - block.tokens[0]
    chats.submit("b", [0, 1, 2, 0, 1, 1, 2, 2, 0], 2)
    with pytest.raises(AssertionError, match="another text"):
        chats.drain()
