"""OpenTelemetry traces, with TANDEM_TRACING=1: a span for each HTTP request and within it one for each sequence.

A sequence's span holds the scheduler's account of it as three more: waiting for a slot, the prompt, generating.
They are made here, when the last output brings that account, so that no other process and no message needs to know of
traces. A client's `traceparent` header is taken up. Where spans go, how many are kept and under which name is said by
OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, ...).

Needs the extra `otel`. Attributes are those of OpenTelemetry's conventions for HTTP and generative AI; Tandem's own
begin with `tandem.`.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import BadConfig
from shared.messages import FinishReason, Submit, Timings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

NS = 1_000_000_000
CLOSE_S = 1.0  # beside what connections take to close (frontend/server.py) within the supervisor's grace
QUIET_PATHS = "health,metrics"  # asked for every few seconds, and of no use in a trace


class Tracing:
    """Args:
        exporter: where spans go; None: over OTLP and HTTP to where the environment says.
    Raises:
        BadConfig: the packages of the extra `otel` are not installed.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise BadConfig(
                f"TANDEM_TRACING needs packages that are not installed ({error.name}): pip install 'mlx-tandem[otel]'"
            ) from error
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "tandem"}
        self._provider: TracerProvider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer: Tracer = self._provider.get_tracer("tandem")
        self._middleware = OpenTelemetryMiddleware

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application with a span for each of its requests."""
        traced: ASGIApp = self._middleware(
            NamedByRoute(app),
            excluded_urls=QUIET_PATHS,
            exclude_spans=["receive", "send"],  # one for each chunk of a stream
            tracer_provider=self._provider,
        )
        return traced

    def sequence(self, submit: Submit, model: str) -> SequenceSpan:
        """The span of a sequence that is submitted now, within the current request's."""
        sampling = submit.sampling
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.provider.name": "tandem",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": submit.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.usage.input_tokens": len(submit.prompt_token_ids),
            "tandem.request_id": submit.request_id,
        }
        return SequenceSpan(self._tracer, self._tracer.start_span(f"generate_content {model}", attributes=attributes))

    def close(self) -> None:
        """Send what is left. Where nobody takes it, it is given up after CLOSE_S: this process has to end in time."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_S)


class SequenceSpan:
    """One sequence, until `end` or `leave`, whichever comes first."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self._started = time.time_ns()
        self._is_open = True

    def end(self, reason: FinishReason, num_tokens: int, timings: Timings | None) -> None:
        """Args:
        num_tokens: of the output.
        timings: the scheduler's account; None where it did not come in time.
        """
        self._span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", [reason])
        if timings is not None:
            self._account(timings)
        self._close()

    def leave(self) -> None:
        """It ended early: the client left, or an error."""
        if self._is_open:
            self._span.set_attribute("gen_ai.response.finish_reasons", ["abort"])
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self._span.end()

    def _account(self, timings: Timings) -> None:
        from opentelemetry.trace import set_span_in_context

        self._span.set_attributes(
            {
                "tandem.cached_tokens": timings.num_cached_tokens,
                "tandem.draft_tokens": timings.num_draft_tokens,
                "tandem.accepted_tokens": timings.num_accepted_tokens,
                "tandem.preemptions": timings.num_preemptions,
            }
        )
        parts = (("queue", timings.queue_s), ("prefill", timings.prefill_s), ("decode", timings.decode_s))
        # They are placed before now: the last token came a moment ago, and the scheduler's clock tells no time of day.
        at = max(self._started, time.time_ns() - int(sum(seconds for _, seconds in parts) * NS))
        within = set_span_in_context(self._span)
        for name, seconds in parts:
            until = at + int(seconds * NS)
            self._tracer.start_span(name, context=within, start_time=at).end(until)
            at = until


class NamedByRoute:
    """Gives a request's span its route's pattern as a name: known when the answer begins, and too late at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.trace import get_current_span

        span = get_current_span()

        async def naming(message: Message) -> None:
            route = getattr(scope.get("route"), "path", None)
            if message["type"] == "http.response.start" and route is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            await send(message)

        await self._app(scope, receive, naming)
