"""GET /metrics: the engine's page, then this process's own counters."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

from frontend.service import service_of

router = APIRouter()
# They are a second series for each counter that nothing reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation there

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class HttpMetrics:
    """Counts of HTTP requests. `path` is a route's pattern, so that strangers' paths cannot add series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        labels = ("method", "path", "status")
        self._requests = Counter("http_requests_total", "HTTP requests answered.", labels, registry=self.registry)
        self._duration = Histogram(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("method", "path"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._call_failures = Counter(
            "tandem:tool_call_parse_failures_total",
            "Tool calls that were malformed or cut off and were given as text.",
            registry=self.registry,
        )
        self._dropped = Gauge(
            "tandem:frontend_dropped_messages",
            "Malformed or stale messages on the frontend's engine socket since its start.",
            registry=self.registry,
        )

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        self._requests.labels(method, path, str(status)).inc()
        self._duration.labels(method, path).observe(seconds)

    def count_failed_call(self) -> None:
        self._call_failures.inc()

    def page(self, num_dropped_messages: int) -> bytes:
        self._dropped.set(num_dropped_messages)
        return generate_latest(self.registry)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text. While the scheduler is silent only the frontend's part is there."""
    engine = service_of(request).engine
    own: HttpMetrics = request.app.state.metrics
    page = await engine.metrics_page()
    own_page = await asyncio.to_thread(own.page, engine.num_dropped_messages)
    separator = b"" if not page or page.endswith(b"\n") else b"\n"
    return Response((page or b"") + separator + own_page, media_type=CONTENT_TYPE_PLAIN_0_0_4)
