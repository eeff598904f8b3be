"""Whose request it is, and what it says of itself outside of its body: all that the work on it needs of HTTP."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from starlette.requests import Request

from frontend.cache_api import cache_salt
from frontend.metrics import HttpMetrics


class Caller(Struct, frozen=True, kw_only=True):
    tenant: str = ""  # as Submit has it
    timeout_s: float | None = None
    cache_salt: str = ""
    on_failed_call: Callable[[], None] = lambda: None  # a tool call of the output was malformed

    @property
    def text_salt(self) -> str:
        """Under which tokens of its texts are remembered: nobody else's get faster by them."""
        return f"{self.tenant}\0{self.cache_salt}"


def caller_of(request: Request) -> Caller:
    metrics: HttpMetrics = request.app.state.metrics
    return Caller(
        tenant=request.scope.get("tenant", ""),
        timeout_s=request.scope.get("timeout_s"),
        cache_salt=cache_salt(request),
        on_failed_call=metrics.count_failed_call,
    )
