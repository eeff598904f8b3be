"""What the frontend asks of the engine, wherever that runs: behind a socket (`engine.py`) or in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from frontend.streams import CancelReason, TokenStream
from shared.errors import TandemError
from shared.messages import CacheReply, EngineStatus, RequestId, Submit, WorkerInfo


class Engine(Protocol):
    """All methods belong to the event loop of `start`."""

    @property
    def status(self) -> EngineStatus | None:
        """The last known one; None before the first."""

    @property
    def is_silent(self) -> bool: ...

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would reach a target that is ready."""

    @property
    def num_live(self) -> int: ...

    @property
    def num_dropped_messages(self) -> int: ...

    @property
    def target_info(self) -> WorkerInfo | None:
        """The last known target."""

    def require_target(self) -> WorkerInfo:
        """The ready target. Raises Unavailable: there is none."""

    def open(self, submits: Sequence[Submit]) -> TokenStream:
        """Start these sequences; their outputs come on the returned stream, labelled by their place in `submits`.

        Raises:
            Unavailable: no target is ready.
        """

    def cancel(self, request_id: RequestId, reason: CancelReason) -> None:
        """Stop this request; its terminal Output still reaches the stream."""

    def forget(self, request_id: RequestId, reason: CancelReason = "client_gone") -> None:
        """Stop this request and drop whatever still comes for it. A request that has ended is left alone."""

    def fail_all(self, error: TandemError) -> None:
        """End every live request with this error."""

    async def metrics_page(self, timeout_s: float = 1.0) -> bytes | None:
        """The engine's Prometheus page; None: it does not answer in time."""

    async def prefix_cache(self, clear: bool, timeout_s: float = 5.0) -> CacheReply | None:
        """State of the prefix cache, emptied before with `clear`; None: the engine does not answer in time."""

    async def start(self) -> None: ...

    def stop(self) -> None:
        """Cancel every live request; new ones are refused from now on."""

    async def close(self) -> None: ...
