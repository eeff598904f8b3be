"""The file of stored responses: bounds, expiry, damage."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from frontend.responses.freeform import FreeformInput
from frontend.responses.seal import seal, unseal
from frontend.responses.store import Store, Stored, StoreFailed
from shared.config import Settings


def stored(name: str, previous: str | None = None, *, size: int = 10) -> Stored:
    response: dict[str, Any] = {"id": name, "created_at": 1, "previous_response_id": previous, "status": "completed"}
    response["output"] = [{"type": "message", "id": f"msg_{name}", "content": "x" * size}]
    return Stored(response, [{"type": "message", "id": f"in_{name}", "role": "user", "content": "y"}])


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def with_store(
    path: Path, use: Callable[[Store], Awaitable[None]], clock: Callable[[], float] | None = None, **bounds: Any
) -> None:
    async def run() -> None:
        store = Store(Settings(responses_file=str(path), **bounds), *([clock] if clock else []))
        try:
            await use(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_chain_is_oldest_first_and_whole(tmp_path: Path) -> None:
    async def use(store: Store) -> None:
        await store.put("t", stored("a"))
        await store.put("t", stored("b", "a"))
        await store.put("t", stored("c", "b"))
        assert [s.response["id"] for s in await store.chain("t", "c")] == ["a", "b", "c"]
        assert await store.chain("other", "c") == []
        assert await store.item("other", "msg_a") is None
        assert (await store.item("t", "msg_a"))["content"] == "x" * 10  # type: ignore[index]  # it is there
        assert not await store.delete("other", "b")
        assert await store.delete("t", "b")
        assert not await store.delete("t", "b")
        assert await store.chain("t", "c") == []
        assert await store.item("t", "in_b") is None
        assert await store.get("t", "c") is not None

    with_store(tmp_path / "r.sqlite3", use)


@pytest.mark.parametrize("bounds", [{"responses_max_num": 3}, {"responses_max_bytes": 3500}])
def test_bounds_drop_what_was_used_longest_ago(tmp_path: Path, bounds: dict[str, int]) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        for name in "abc":
            clock.now += 1
            await store.put("t", stored(name, size=900))
        clock.now += 1
        await store.get("t", "a")
        clock.now += 1
        await store.put("u", stored("d", size=900))
        found = [name for name in "abcd" if await store.get("u" if name == "d" else "t", name)]
        assert found == ["a", "c", "d"]

    with_store(tmp_path / "r.sqlite3", use, clock, **bounds)


def test_expiry_counts_from_the_last_use(tmp_path: Path) -> None:
    clock = Clock()

    async def use(store: Store) -> None:
        await store.put("t", stored("a"))
        await store.put("t", stored("b"))
        clock.now += 60
        assert await store.get("t", "a") is not None
        clock.now += 60
        assert await store.get("t", "b") is None
        assert await store.get("t", "a") is not None
        await store.put("t", stored("c"))
        with sqlite3.connect(store.path) as connection:
            assert connection.execute("SELECT id FROM responses ORDER BY id").fetchall() == [("a",), ("c",)]
        connection.close()

    with_store(tmp_path / "r.sqlite3", use, clock, responses_ttl_s=100)


def test_the_key_stays_and_a_running_response_of_another_process_has_failed(tmp_path: Path) -> None:
    keys = []

    async def begin(store: Store) -> None:
        keys.append(await store.key())
        await store.put("t", stored("a"), is_running=True)
        assert (await store.get("t", "a")).response["status"] == "completed"  # type: ignore[union-attr]  # it is there

    async def look(store: Store) -> None:
        keys.append(await store.key())
        found = await store.get("t", "a")
        assert found is not None
        assert found.response["status"] == "failed"
        assert "restarted" in found.response["error"]["message"]

    with_store(tmp_path / "r.sqlite3", begin)
    with_store(tmp_path / "r.sqlite3", look)
    assert keys[0] == keys[1]
    assert len(keys[0]) == 32


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite3"
    path.write_bytes(b"this is no database, however long one looks at it" * 100)

    async def use(store: Store) -> None:
        await store.put("t", stored("a"))
        assert await store.get("t", "a") is not None

    with_store(path, use)
    assert path.with_suffix(".damaged").read_bytes().startswith(b"this is no database")


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def use(store: Store) -> None:
        with pytest.raises(StoreFailed, match="store: false"):
            await store.put("t", stored("a"))

    with_store(tmp_path / "file" / "r.sqlite3", use)


def test_seals_are_bound_to_key_tenant_and_kind() -> None:
    sealed = seal(b"k" * 32, "t", "reasoning", "héllo" * 100)
    assert unseal(b"k" * 32, "t", "reasoning", sealed) == "héllo" * 100
    assert unseal(b"l" * 32, "t", "reasoning", sealed) is None
    assert unseal(b"k" * 32, "u", "reasoning", sealed) is None
    assert unseal(b"k" * 32, "t", "compaction", sealed) is None
    for i in range(0, len(sealed), 7):
        changed = sealed[:i] + ("A" if sealed[i] != "A" else "B") + sealed[i + 1 :]
        assert unseal(b"k" * 32, "t", "reasoning", changed) is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (' { "input" : "a\\n\\"b\\" \\u00e9 \\ud83d\\ude00 \\\\"}', 'a\n"b" é 😀 \\'),
        ('{"input": "\\ud800x\\udc00"}', "?x?"),
        ('{"input": "\\ud83d\\n"}', "?\n"),
        ('{"input": "a", "b": "c"}', "a"),
        ('{"text": "a"}', ""),
        ('{"input": 5}', ""),
    ],
)
def test_freeform_input_however_it_is_cut(arguments: str, text: str) -> None:
    for first in range(len(arguments)):
        for second in (first + 1, first + 4):
            reader = FreeformInput()
            pieces = (arguments[:first], arguments[first:second], arguments[second:])
            assert "".join(reader.feed(piece) for piece in pieces) == text
