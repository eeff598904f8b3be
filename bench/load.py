"""An HTTP client that plays a workload against any OpenAI-compatible server and times every request.

Closed loop: `concurrency` clients, each sends its next request when the last one ended. Open loop: each request is sent
at its own arrival time, however many are under way. All times are this process's monotonic clock.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal

import httpx
import msgspec

from bench.report import spread
from bench.workloads import Prompt

MAX_EVENT_BYTES = 1 << 20
Endpoint = Literal["chat", "completions"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server and how to ask it."""

    url: str
    model: str = "default"
    endpoint: Endpoint = "chat"
    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int | None = None
    api_key: str | None = None
    extra_body: dict[str, Any] = msgspec.field(default_factory=dict)
    timeout_s: float = 600.0  # of one request, from sending to its end

    @property
    def headers(self) -> dict[str, str]:
        own = {"Accept-Encoding": "identity"}  # raw chunks are read and timed as they come
        return own | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})

    def body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            body["messages"] = prompt.messages or [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        if self.seed is not None:
            body["seed"] = self.seed
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | self.extra_body


class Record(msgspec.Struct, kw_only=True):
    """What one request saw. Seconds: `start_s` after the start of the load, the others after the request was sent."""

    index: int
    start_s: float = 0.0
    chunk_s: list[float] = msgspec.field(default_factory=list)  # arrival of each chunk with text
    end_s: float | None = None  # end of the stream
    prompt_tokens: int | None = None  # from `usage`; None when the server sent none
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None
    text: str = ""
    text_sha256: str | None = None
    timings: dict[str, Any] | None = None  # the server's own block, where it has one

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_s[0] if self.chunk_s else None

    @property
    def itl_s(self) -> list[float]:
        """Gaps between chunks; one chunk may carry several tokens."""
        return [after - before for before, after in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """(end - first token) / (output tokens - 1)."""
        if not self.chunk_s or self.end_s is None or (self.completion_tokens or 0) < 2:
            return None
        return (self.end_s - self.chunk_s[0]) / ((self.completion_tokens or 0) - 1)


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """A finished load. `wall_s`: from the first request sent to the last one ended."""

    records: list[Record]
    wall_s: float


async def play(
    target: Target,
    prompts: Sequence[Prompt],
    concurrency: int,
    on_end: Callable[[Record], None] = lambda record: None,
) -> Played:
    """Sends every prompt once and returns when all have ended; failures are in the records, not raised.

    Args:
        concurrency: clients of the closed loop; not used where the prompts have arrival times.
        on_end: called with each record as it ends, for a progress bar.
    """
    is_open = bool(prompts) and prompts[0].arrival_s is not None
    connections = len(prompts) if is_open else concurrency
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    timeout = httpx.Timeout(target.timeout_s)
    async with httpx.AsyncClient(
        base_url=target.url, headers=target.headers, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        origin = time.perf_counter()
        records: list[Record] = []

        async def one(prompt: Prompt) -> None:
            record = await _request(client, target, prompt, origin)
            records.append(record)
            on_end(record)

        async def closed_client(queue: Iterator[Prompt]) -> None:
            for prompt in queue:
                await one(prompt)

        async def open_client(prompt: Prompt) -> None:
            await asyncio.sleep(max(0.0, (prompt.arrival_s or 0.0) - (time.perf_counter() - origin)))
            await one(prompt)

        async with asyncio.TaskGroup() as group:
            if is_open:
                for prompt in prompts:
                    group.create_task(open_client(prompt))
            else:
                queue = iter(prompts)
                for _ in range(min(concurrency, len(prompts))):
                    group.create_task(closed_client(queue))
    first = min((r.start_s for r in records), default=0.0)
    last = max((r.start_s + (r.end_s or 0.0) for r in records), default=0.0)
    return Played(records=sorted(records, key=lambda r: r.index), wall_s=last - first)


async def _request(client: httpx.AsyncClient, target: Target, prompt: Prompt, origin: float) -> Record:
    """One request to its end. `end_s` is set whatever happens."""
    record = Record(index=prompt.index)
    sent = time.perf_counter()
    record.start_s = sent - origin
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            client.stream("POST", PATHS[target.endpoint], json=target.body(prompt), headers=prompt.headers) as response,
        ):
            record.status = response.status_code
            if response.status_code != 200:
                record.error = (await response.aread())[:300].decode(errors="replace")
            else:
                await _read_stream(response, record, sent)
    except TimeoutError:
        record.error = f"no end after {target.timeout_s} s"
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        record.error = f"{type(error).__name__}: {error}"[:300]
    record.end_s = time.perf_counter() - sent
    return record


async def _read_stream(response: httpx.Response, record: Record, sent: float) -> None:
    """Fills the record from server-sent events.

    Raises:
        ValueError: an event is not JSON, too long, or an error of the server.
    """
    digest = hashlib.sha256()
    texts: list[str] = []
    done = False
    async for data in _events(response):
        now = time.perf_counter() - sent
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        if event.get("error"):
            raise ValueError(f"error event: {event['error']}")
        for choice in event.get("choices") or []:
            text = _text(choice)
            if text:
                record.chunk_s.append(now)
                digest.update(text.encode())
                texts.append(text)
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
        usage = event.get("usage")
        if usage:
            record.prompt_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
            record.completion_tokens = usage.get("completion_tokens", usage.get("output_tokens"))
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
            record.cached_tokens = details.get("cached_tokens")
        record.timings = event.get("timings") or record.timings
    record.text, record.text_sha256 = "".join(texts), digest.hexdigest()
    if record.finish_reason is None:
        record.error = "stream ended without a finish reason" + ("" if done else " and without [DONE]")


def _text(choice: dict[str, Any]) -> str:
    """All text of a chunk: content, reasoning and tool call arguments; "" for a chunk with only a role or an end."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    text = (delta.get("reasoning_content") or delta.get("reasoning") or "") + (delta.get("content") or "")
    for call in delta.get("tool_calls") or []:
        function = call.get("function") or {}
        text += (function.get("name") or "") + (function.get("arguments") or "")
    return text


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The `data:` payloads of a stream of server-sent events; comments (keep-alives) are left out."""
    pending = b""
    async for part in response.aiter_raw():
        pending += part
        *lines, pending = pending.split(b"\n")
        if len(pending) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if pending.startswith(b"data:"):
        yield pending[5:].strip()


def summarize(played: Played, concurrency: int | None) -> dict[str, Any]:
    """Figures of a load. Token rates are None when a request that ended well has no `usage`."""
    records = played.records
    good = [r for r in records if r.error is None]
    without_usage = [r for r in good if r.completion_tokens is None]
    output_tokens = sum(r.completion_tokens or 0 for r in good)
    prompt_tokens = sum(r.prompt_tokens or 0 for r in good)
    is_counted = bool(good) and not without_usage and played.wall_s > 0
    cached = [r.cached_tokens for r in good if r.cached_tokens is not None]
    return {
        "concurrency": concurrency,
        "num_requests": len(records),
        "num_errors": len(records) - len(good),
        "errors": dict(Counter(f"{r.status}: {r.error}"[:160] for r in records if r.error is not None)),
        "statuses": dict(Counter(str(r.status) for r in records)),
        "finish_reasons": dict(Counter(str(r.finish_reason) for r in good)),
        "num_without_usage": len(without_usage),
        "wall_s": played.wall_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": sum(cached) if cached else None,
        "output_tokens_per_s": output_tokens / played.wall_s if is_counted else None,
        "total_tokens_per_s": (output_tokens + prompt_tokens) / played.wall_s if is_counted else None,
        "requests_per_s": len(good) / played.wall_s if good and played.wall_s > 0 else None,
        "ttft_s": spread([r.ttft_s for r in good if r.ttft_s is not None]),
        "itl_s": spread([gap for r in good for gap in r.itl_s]),
        "tpot_s": spread([r.tpot_s for r in good if r.tpot_s is not None]),
        "e2e_s": spread([r.end_s for r in good if r.end_s is not None]),
    }
