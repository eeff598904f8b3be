"""An event loop in a thread of its own, for callers that have none, or one of their own (a notebook)."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
STOP_S = 10.0
OTHER_SYSTEMS_WAIT_S = 0.05


class LoopClosed(RuntimeError):
    """Nothing can be run there any more."""


class LoopThread:
    """A daemon thread: a program that forgets to close it still ends."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run it there and wait. An interrupt of the caller cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run it there; do not wait.

        Raises:
            LoopClosed: it was closed.
        """
        if not self._thread.is_alive():
            work.close()
            raise LoopClosed
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Stop after what is queued. Nothing more is run there."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_S)
            self._wait_gone()

    def _wait_gone(self) -> None:
        """Until the system's thread has ended, which is a little after Python's.

        MLX keeps Python objects in C++ thread-locals. Their destructors take the interpreter's lock; an interpreter
        that ends meanwhile stops the thread in the middle of one, and C++ then aborts the process.
        """
        if sys.platform != "linux":
            time.sleep(OTHER_SYSTEMS_WAIT_S)  # there is no exact way to ask
            return
        task = Path(f"/proc/self/task/{self._thread.native_id}")
        deadline = time.monotonic() + STOP_S
        while task.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
