"""Responses on disk: one SQLite file, used by one thread, private to the user who runs the server.

A response lies in it with the items of its own request; a conversation is the chain of `previous_id`. What belongs to
one API key is not there for another. The file is bounded in count and in bytes: the responses that were used longest
ago go first, and using one uses all of its chain. A response that was running when its process ended is failed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from shared.config import Settings
from shared.errors import Unavailable

log = logging.getLogger("frontend")

_T = TypeVar("_T")
MAX_CHAIN = 10_000  # responses in one conversation

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS responses (
  id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous_id TEXT, owner TEXT NOT NULL, is_running INTEGER NOT NULL,
  created_at REAL NOT NULL, used_at REAL NOT NULL, num_bytes INTEGER NOT NULL, body BLOB NOT NULL, input BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used_at);
CREATE TABLE IF NOT EXISTS items (
  tenant TEXT NOT NULL, item_id TEXT NOT NULL, response_id TEXT NOT NULL, item BLOB NOT NULL,
  PRIMARY KEY (tenant, item_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_response ON items (response_id);
"""


RETRY_AFTER_S = 10.0  # somebody has to make room first


class StoreFailed(Unavailable):
    """The file cannot be read or written (disk full, no permission); requests that store nothing go on."""


class Stored(Struct, frozen=True):
    """A response as clients see it, and the items of its own request."""

    response: dict[str, Any]
    input_items: list[dict[str, Any]]


class Store:
    """Opened by its first use. All methods may raise StoreFailed."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.time) -> None:
        self.path = (
            Path(settings.responses_file).expanduser()
            if settings.responses_file
            else settings.cache_folder / "responses" / f"{settings.port}.sqlite3"
        )
        self._max_num = settings.responses_max_num
        self._max_bytes = settings.responses_max_bytes
        self._ttl_s = settings.responses_ttl_s
        self._now = now
        self._owner = uuid.uuid4().hex
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses store")
        self._connection: sqlite3.Connection | None = None
        self._key = b""

    # ------------------------------------------------------------ for the event loop

    async def key(self) -> bytes:
        """The server's key for seals: made once, kept in the file."""
        return await self._run(lambda _: self._key)

    async def put(self, tenant: str, stored: Stored, *, is_running: bool = False) -> None:
        """Write a response, be it new or changed."""
        await self._run(lambda connection: self._put(connection, tenant, stored, is_running))

    async def get(self, tenant: str, response_id: str) -> Stored | None:
        chain = await self._run(lambda connection: self._chain(connection, tenant, response_id, 1))
        return chain[0] if chain else None

    async def chain(self, tenant: str, response_id: str) -> list[Stored]:
        """The response and all before it, oldest first; empty where it or one before it is not there."""
        return await self._run(lambda connection: self._chain(connection, tenant, response_id, MAX_CHAIN))

    async def item(self, tenant: str, item_id: str) -> dict[str, Any] | None:
        return await self._run(lambda connection: self._item(connection, tenant, item_id))

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Whether it was there."""
        return await self._run(lambda connection: self._delete(connection, tenant, response_id))

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    # ------------------------------------------------------------ in the thread

    def _work(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            if self._connection is None:
                self._connection = self._open()
            with self._connection:
                return work(self._connection)
        except (sqlite3.Error, OSError) as error:
            log.error("the responses store %s: %s", self.path, error)
            message = "stored responses cannot be read or written now; send store: false"
            raise StoreFailed(message, retry_after_s=RETRY_AFTER_S) from error

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # locked, full, not writable: the content may be fine
            aside = self.path.with_suffix(".damaged")
            log.warning("%s is damaged (%s): it is kept as %s and a new one is begun", self.path, error, aside)
            self.path.replace(aside)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        self.path.chmod(0o600)  # SQLite gives its -wal and -shm files the same mode
        connection = sqlite3.connect(self.path, timeout=10)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(_SCHEMA)
            with connection:
                connection.execute("INSERT OR IGNORE INTO meta VALUES ('key', ?)", (secrets.token_bytes(32),))
                self._fail_interrupted(connection)
                self._evict(connection, keep="")
            (self._key,) = connection.execute("SELECT value FROM meta WHERE name = 'key'").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _fail_interrupted(self, connection: sqlite3.Connection) -> None:
        """Nobody runs what another process had begun: one process at a time listens on a port."""
        rows = connection.execute(
            "SELECT id, tenant, body, input FROM responses WHERE is_running AND owner != ?", (self._owner,)
        ).fetchall()
        for _, tenant, body, items in rows:
            response = msgspec.json.decode(body)
            response["status"] = "failed"
            response["error"] = {"code": "server_error", "message": "the server was restarted while this ran"}
            self._put(connection, tenant, Stored(response, msgspec.json.decode(items)), is_running=False)

    def _put(self, connection: sqlite3.Connection, tenant: str, stored: Stored, is_running: bool) -> None:
        response, now = stored.response, self._now()
        response_id: str = response["id"]
        body, items = msgspec.json.encode(response), msgspec.json.encode(stored.input_items)
        row = (
            response_id, tenant, response.get("previous_response_id"), self._owner, is_running,
            response["created_at"], now, len(body) + len(items), body, items,
        )  # fmt: skip
        connection.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.executemany(
            "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)",
            (
                (tenant, item["id"], response_id, msgspec.json.encode(item))
                for item in (*stored.input_items, *response["output"])
            ),
        )
        self._evict(connection, keep=response_id)

    def _evict(self, connection: sqlite3.Connection, *, keep: str) -> None:
        expired = connection.execute("SELECT id FROM responses WHERE used_at < ?", (self._now() - self._ttl_s,))
        self._remove(connection, [row[0] for row in expired.fetchall()])
        count, size = connection.execute("SELECT count(*), coalesce(sum(num_bytes), 0) FROM responses").fetchone()
        if count <= self._max_num and size <= self._max_bytes:
            return
        gone = []
        for response_id, num_bytes in connection.execute("SELECT id, num_bytes FROM responses ORDER BY used_at, rowid"):
            if count <= self._max_num and size <= self._max_bytes:
                break
            if response_id != keep:
                gone.append(response_id)
                count, size = count - 1, size - num_bytes
        self._remove(connection, gone)

    def _remove(self, connection: sqlite3.Connection, response_ids: Iterable[str]) -> None:
        for response_id in response_ids:
            connection.execute("DELETE FROM responses WHERE id = ?", (response_id,))
            connection.execute("DELETE FROM items WHERE response_id = ?", (response_id,))

    def _chain(self, connection: sqlite3.Connection, tenant: str, response_id: str, limit: int) -> list[Stored]:
        chain: list[Stored] = []
        next_id: str | None = response_id
        ids = []
        while next_id is not None and len(chain) < limit:
            row = connection.execute(
                "SELECT body, input, previous_id FROM responses WHERE id = ? AND tenant = ? AND used_at >= ?",
                (next_id, tenant, self._now() - self._ttl_s),
            ).fetchone()
            if row is None:
                return []
            ids.append(next_id)
            body, items, next_id = row
            chain.append(Stored(msgspec.json.decode(body), msgspec.json.decode(items)))
        now = self._now()
        connection.executemany("UPDATE responses SET used_at = ? WHERE id = ?", [(now, used) for used in ids])
        return chain[::-1]

    def _item(self, connection: sqlite3.Connection, tenant: str, item_id: str) -> dict[str, Any] | None:
        row = connection.execute(
            "SELECT item FROM items WHERE tenant = ? AND item_id = ?", (tenant, item_id)
        ).fetchone()
        found: dict[str, Any] | None = msgspec.json.decode(row[0]) if row is not None else None
        return found

    def _delete(self, connection: sqlite3.Connection, tenant: str, response_id: str) -> bool:
        row = connection.execute(
            "SELECT 1 FROM responses WHERE id = ? AND tenant = ?", (response_id, tenant)
        ).fetchone()
        if row is None:
            return False
        self._remove(connection, [response_id])
        return True
