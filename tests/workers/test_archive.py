"""Copies of cached blocks on SSD and in host memory: they come back whole or not at all."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from scheduler.prefix.hashing import chain_seed, extend_chain
from shared.messages import BlocksArchived, LoadBlocks, Release, Step
from tests.support.engine_rig import EngineRig, decoder_target, make_engine, mlx_lm_target
from tests.support.fake_target import worker_info
from workers.archiver import Archiver
from workers.cache.archive import PAUSE_AFTER_ERROR_S, Archive, ArchivedState, Copy
from workers.engine import Engine

LAYOUT = "4 positions of tests"
NAME = bytes(range(16))


def content(seed: int = 0, size: int = 1000) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)


def archive(root: Path, **changes: object) -> Archive:
    values: dict[str, object] = {"fingerprint": "abc", "layout": LAYOUT, "ssd_bytes": 1 << 20, "host_bytes": 0}
    return Archive(root, **(values | changes))  # type: ignore[arg-type]


def name(i: int) -> bytes:
    return i.to_bytes(16, "big")


def test_a_block_outlives_the_process(tmp_path: Path) -> None:
    states = (ArchivedState(3, "float32", (1, 2), b"12345678"),)
    archive(tmp_path).put(NAME, Copy(content(), states, True))
    again = archive(tmp_path)
    assert again.blocks() == {NAME: "ws"}
    copy = again.get(NAME)
    assert copy is not None
    assert copy.states == states
    assert np.array_equal(copy.content, content())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-5] + b"x" + path.read_bytes()[-4:]),
        lambda path: path.write_bytes(b"TANDEMKV" + b"\xff" * 40),
    ],
    ids=["cut", "head only", "empty", "one byte", "nonsense"],
)
def test_a_damaged_file_is_dropped_and_counted(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    store = archive(tmp_path)
    store.put(NAME, Copy(content(), None, False))
    (path,) = tmp_path.glob("*/*.kv")
    damage(path)
    assert store.get(NAME) is None
    assert store.take_errors() == 1
    assert not path.exists()
    assert store.blocks() == {}


def test_files_of_another_model_or_layout_are_not_read(tmp_path: Path) -> None:
    archive(tmp_path).put(NAME, Copy(content(), None, False))
    assert archive(tmp_path, fingerprint="other").blocks() == {}
    assert archive(tmp_path, layout="8 positions").blocks() == {}


def test_the_least_recently_used_files_go_when_the_size_is_reached(tmp_path: Path) -> None:
    store = archive(tmp_path, ssd_bytes=5000)
    removed = []
    for i in range(4):
        removed += store.put(name(i), Copy(content(i), None, False))[1]
    assert not removed
    assert store.get(name(0)) is not None  # used now
    removed += store.put(name(9), Copy(content(9), None, False))[1]
    assert removed == [name(1)]
    assert store.sizes()[1]["ssd"] <= 5000
    assert set(store.blocks()) == {name(0), name(2), name(3), name(9)}


def test_two_servers_share_a_folder(tmp_path: Path) -> None:
    one, other = archive(tmp_path), archive(tmp_path)
    one.put(NAME, Copy(content(), None, False))
    other.put(NAME, Copy(content(), None, False))
    one.clear()
    assert other.get(NAME) is None, "a file that the other one removed is a miss"
    assert other.put(NAME, Copy(content(), None, False))[0]
    assert other.get(NAME) is not None


def test_a_full_disk_is_counted_and_left_alone_for_a_while(tmp_path: Path) -> None:
    store = archive(tmp_path)
    with small_files(100):
        assert store.put(NAME, Copy(content(), None, False)) == (False, [])
    assert store.take_errors() == 1
    assert store.put(NAME, Copy(content(), None, False)) == (False, []), f"tried before {PAUSE_AFTER_ERROR_S} s"
    assert not list(tmp_path.glob("*/*")), "a part of a file was left"


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Writes beyond `num_bytes` of a file fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_host_memory_holds_copies_within_its_size(tmp_path: Path) -> None:
    store = archive(tmp_path, ssd_bytes=0, host_bytes=3500)
    removed = []
    for i in range(5):
        removed += store.put(name(i), Copy(content(i), None, False))[1]
    assert removed == [name(0), name(1)]
    assert store.sizes() == ({"host": 3, "ssd": 0}, {"host": 3000, "ssd": 0})
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
import numpy as np
from workers.cache.archive import Archive, Copy
store = Archive(Path(sys.argv[1]), "abc", "4 positions of tests", 1 << 30, 0)
print("ready", flush=True)
for i in range(100000):
    store.put(i.to_bytes(16, "big"), Copy(np.full(300_000, i % 251, np.uint8), None, False))
"""


def test_after_kill_9_while_writing_what_is_there_is_whole(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*/*.kv"))) < 20:
            assert time.monotonic() < deadline, "nothing is written"
            os.sched_yield()
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()  # type: ignore[union-attr] # a pipe was asked for
    store = archive(tmp_path, ssd_bytes=1 << 30)
    blocks = store.blocks()
    assert len(blocks) >= 20
    for block_hash in blocks:
        copy = store.get(block_hash)
        assert copy is not None, "a file under its final name was torn"
        assert set(copy.content.tolist()) == {int.from_bytes(block_hash, "big") % 251}


def test_what_a_dead_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    store = archive(tmp_path)
    store.put(NAME, Copy(content(), None, False))
    (folder,) = tmp_path.iterdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    torn, written = folder / f".one.kv.{ended.pid}", folder / f".two.kv.{os.getpid()}"
    for file in (torn, written):
        file.write_bytes(b"the beginning of a block")
    assert len(archive(tmp_path).blocks()) == 1
    assert not torn.exists()
    assert written.exists(), "a server beside this one may be writing it"


class ArchivedRig(EngineRig):
    """An engine rig whose target has an archive, worked off after every message as the target process does."""

    def __init__(self, engine: Engine, root: Path, num_blocks: int = 24) -> None:
        assert engine.blocks is not None
        store = Archive(root, "model", engine.blocks.layout, 1 << 30, 0)
        self.archiver = Archiver(engine.blocks, store)
        super().__init__(engine, num_blocks=num_blocks)
        for message in self.archiver.everything(self.epochs["target"]):
            self.send("target", message)

    def work(self) -> bool:
        if self.queue and isinstance(self.queue[0], LoadBlocks):
            self.archiver.load(self.queue.popleft())  # type: ignore[arg-type] # just looked
            self.settle(lambda: not self.archiver.is_loading)
            return True
        message = self.queue[0] if self.queue else None
        worked = super().work()
        if isinstance(message, Step | Release):
            self.archiver.stored(message.stores)
        return worked

    def settle(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not is_done():
            assert time.monotonic() < deadline, "the archive does not answer"
            self.archiver.copy_some(is_idle=True)
            if (loaded := self.archiver.loaded()) is not None:
                self.send("target", loaded)
            if (news := self.archiver.news(self.epochs["target"])) is not None:
                self.send("target", news)
            time.sleep(0.001)  # the second thread has to run

    def save(self) -> None:
        """Until every block that is worth it is in its file."""
        self.settle(lambda: not self.archiver.has_work and self.archiver._num_writing == 0)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, "slots") for kind in ("full", "sliding", "qwen3_next", "lfm2")]
    + [(kind, "paged") for kind in ("full", "sliding", "qwen3_next")],
)
def test_a_new_process_goes_on_from_the_files_of_the_old_one(kind: str, layout: str, tmp_path: Path) -> None:
    models = {"full": decoder_target, "sliding": lambda: decoder_target(window=8)}
    model = (models.get(kind) or (lambda: mlx_lm_target(kind)))()
    engine = make_engine(model, num_slots=4, block_size=4, layout=layout)
    rng = random.Random(2)
    prompt = [rng.randrange(40) for _ in range(60)]
    first = ArchivedRig(engine, tmp_path)
    wanted = first.run({"a": prompt}, 8)["a"]
    first.save()
    first.archiver.close()
    for damaged in range(2):
        second = ArchivedRig(engine, tmp_path)
        assert second.run({"b": prompt}, 8)["b"] == wanted
        timings = second.outputs["b"][-1].timings
        assert timings is not None
        counts = second.core.metrics.prefix
        if damaged:
            assert timings.num_cached_tokens == 0
            assert counts.misses["load_failed"] == 1
            assert counts.archive_errors == 1
        else:
            assert timings.num_cached_tokens == 56
            hashes: list[bytes] = []
            extend_chain(hashes, chain_seed(worker_info().fingerprint, "\0", 4), prompt, 1, 4)
            (first_block,) = tmp_path.glob(f"*/{hashes[0].hex()}-*.kv")
            first_block.write_bytes(first_block.read_bytes()[:-1])
        second.archiver.close()
    mx.eval(engine.store.pending())


def test_news_tells_sizes(tmp_path: Path) -> None:
    engine = make_engine(decoder_target(), num_slots=4, block_size=4)
    rig = ArchivedRig(engine, tmp_path)
    rig.run({"a": list(range(20))}, 3)
    rig.save()
    rig.send("target", BlocksArchived(epoch=rig.epochs["target"], removed=[b"unknown"]))
    counts = rig.core.metrics.prefix
    assert counts.blocks["ssd"] == 5
    assert counts.tier_bytes["ssd"] == sum(p.stat().st_size for p in tmp_path.glob("*/*.kv"))
    rig.archiver.close()


def test_host_copies_are_given_back_where_memory_is_short_and_files_stay(tmp_path: Path) -> None:
    both = archive(tmp_path, host_bytes=1 << 20)
    both.put(name(1), Copy(content(1), None, True))
    assert both.drop_copies() == [], "its file is still there"
    assert both.sizes()[1]["host"] == 0
    assert both.get(name(1)) is not None
    host = archive(tmp_path / "host", ssd_bytes=0, host_bytes=1 << 20)
    host.put(name(2), Copy(content(2), None, True))
    assert host.drop_copies() == [name(2)]
    assert host.get(name(2)) is None
    assert host.blocks() == {}
