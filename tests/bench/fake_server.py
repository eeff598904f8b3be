"""A small server that speaks OpenAI's streaming format as each test scripts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

Write = Callable[[bytes], Awaitable[None]]
Answer = Callable[[dict[str, Any], Write], Awaitable[None]]

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def delta(text: str | None, finish_reason: str | None = None) -> bytes:
    content = {"role": "assistant"} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": content, "finish_reason": finish_reason}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": counts})


def status(code: int, text: str) -> bytes:
    return f"HTTP/1.1 {code} X\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}".encode()


def page(text: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(text.encode())}\r\nConnection: close\r\n\r\n{text}".encode()


@asynccontextmanager
async def serve(answer: Answer, pages: Mapping[str, Callable[[], str]] | None = None) -> AsyncIterator[str]:
    """A server on a free port, as its URL. `answer` gets the request's JSON body and writes the whole response.

    Args:
        pages: what GET of a path gives; 404 for any other.
    """

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get "):
                text = (pages or {}).get(head.split()[1].decode())
                await write(page(text()) if text is not None else status(404, "no such page"))
                return
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
            )
            await answer(json.loads(await reader.readexactly(length)), write)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
