"""A collector that does not take spans keeps nobody waiting; what spans hold is tested through the real processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from shared.messages import RequestId, SamplingParams, Submit

sdk = pytest.importorskip("opentelemetry.sdk.trace")

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult  # noqa: E402 - only where it is installed

from frontend import tracing  # noqa: E402


class Stuck(SpanExporter):
    def __init__(self) -> None:
        self.was_asked, self.is_released = threading.Event(), threading.Event()
        self.is_done = False

    def export(self, spans: Sequence[object]) -> SpanExportResult:
        self.was_asked.set()
        self.is_released.wait(60)
        self.is_done = True
        return SpanExportResult.SUCCESS


def test_closing_does_not_wait_for_a_collector_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_S", 0.1)
    exporter = Stuck()
    spans = tracing.Tracing(exporter)
    submit = Submit(request_id=RequestId("a"), prompt_token_ids=[1], sampling=SamplingParams(), max_tokens=1)
    spans.sequence(submit, "m").leave()
    spans.close()
    try:
        assert exporter.was_asked.wait(30)
        assert not exporter.is_done
    finally:
        exporter.is_released.set()
