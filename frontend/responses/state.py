"""What outlives one request: stored responses, running ones, and the events of background ones."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Protocol

from frontend.drain import Door
from frontend.responses.event_log import EventLog
from frontend.responses.store import Store, Stored
from shared.config import Settings
from shared.errors import InvalidRequest, NotFound

log = logging.getLogger("frontend")

MAX_LOGS = 64  # background responses whose events can be read again
MAX_LOG_BYTES = 64 * 1024 * 1024


class Run(Protocol):
    """A response that is being made."""

    response_id: str
    tenant: str
    is_background: bool

    def stored(self) -> Stored:
        """As it is now."""

    def cancel(self) -> None:
        """Stop the engine's work on it."""

    async def work(self, events: EventLog) -> None:
        """Make it, telling `events`; errors are told there too."""

    async def wait_ended(self) -> None: ...


class Responses:
    def __init__(self, settings: Settings, door: Door) -> None:
        self.store = Store(settings)
        self._door = door
        self._running: dict[str, Run] = {}
        self._logs: OrderedDict[str, tuple[str, EventLog]] = OrderedDict()  # id -> (tenant, events)
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ running

    def begin(self, run: Run) -> None:
        self._running[run.response_id] = run

    def end(self, run: Run) -> None:
        self._running.pop(run.response_id, None)

    def start_background(self, run: Run) -> EventLog:
        """Make the response in a task of its own. Its client may leave and come back."""
        events = EventLog()
        self._logs[run.response_id] = (run.tenant, events)
        task = asyncio.create_task(run.work(events), name=f"background {run.response_id}")
        self._tasks.add(task)
        self._door.num_inside += 1
        task.add_done_callback(self._ended)
        self._drop_old_logs()
        return events

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._door.num_inside -= 1

    def _drop_old_logs(self) -> None:
        ended = [name for name, (_, events) in self._logs.items() if events.is_closed]
        size = sum(events.num_bytes for _, events in self._logs.values())
        for name in ended:
            if len(self._logs) <= MAX_LOGS and size <= MAX_LOG_BYTES:
                break
            size -= self._logs.pop(name)[1].num_bytes

    def running(self, tenant: str, response_id: str) -> Run | None:
        run = self._running.get(response_id)
        return run if run is not None and run.tenant == tenant else None

    def events(self, tenant: str, response_id: str) -> EventLog | None:
        found = self._logs.get(response_id)
        return found[1] if found is not None and found[0] == tenant else None

    # ------------------------------------------------------------ all of them

    async def find(self, tenant: str, response_id: str) -> Stored:
        """A response, running or stored.

        Raises:
            NotFound: there is none, or it belongs to another API key.
        """
        run = self.running(tenant, response_id)
        found = run.stored() if run is not None else await self.store.get(tenant, response_id)
        if found is None:
            raise _not_found(response_id)
        return found

    async def history(self, tenant: str, response_id: str) -> list[Stored]:
        """A finished response and all that came before it, oldest first.

        Raises:
            NotFound: it or one before it is not there.
            InvalidRequest: it is still running.
        """
        if self.running(tenant, response_id) is not None:
            raise InvalidRequest(
                f"previous_response_id: {response_id!r} is still running", param="previous_response_id"
            )
        chain = await self.store.chain(tenant, response_id)
        if not chain:
            raise NotFound(
                f"previous_response_id: there is no response {response_id!r} (with all before it) for this API key",
                param="previous_response_id",
            )
        return chain

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a response; a running one is stopped first. Raises NotFound."""
        run = self.running(tenant, response_id)
        if run is not None:
            run.cancel()
            await run.wait_ended()
        if self.events(tenant, response_id) is not None:
            del self._logs[response_id]
        if not await self.store.delete(tenant, response_id) and run is None:
            raise _not_found(response_id)

    async def cancel(self, tenant: str, response_id: str) -> Stored:
        """Stop a response that is running; one that has ended in the background stays as it is.

        Raises:
            NotFound: there is none.
            InvalidRequest: it was no background response and has ended.
        """
        run = self.running(tenant, response_id)
        if run is not None:
            run.cancel()
            await run.wait_ended()
            return run.stored()
        found = await self.find(tenant, response_id)
        if not found.response.get("background"):
            raise InvalidRequest(f"{response_id!r} has ended: only a response that still runs can be cancelled")
        return found

    async def close(self) -> None:
        """Wait for the ends of background responses (the engine has failed them by now), then close the file."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        await self.store.close()


def _not_found(response_id: str) -> NotFound:
    return NotFound(f"there is no response {response_id!r} for this API key", param="response_id")
