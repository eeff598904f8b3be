"""The client for code on an event loop: the methods of `Client`, to be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Self, Unpack

import httpx
import msgspec

from shared.errors import Unavailable
from tandem.client import exchange
from tandem.client.answers import Answer, CacheState, Chunk, Health, ModelCard
from tandem.client.control import restart
from tandem.options import Message, Options, SamplingOptions


class AsyncClient:
    """As `Client`, for one event loop."""

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, timeout_s: float = exchange.TIMEOUT_S
    ) -> None:
        self.url = exchange.address(url)
        self._http = httpx.AsyncClient(base_url=self.url, headers=exchange.headers(api_key), timeout=timeout_s)

    async def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """The answer to a conversation. `images`, `videos` and `audio` are sent with it."""
        body = await asyncio.to_thread(exchange.chat_body, messages, options, stream=False)  # it reads files
        return exchange.answer_of(await self._send("POST", exchange.CHAT, body))

    def stream(self, messages: Sequence[Message], **options: Unpack[Options]) -> AsyncAnswerStream:
        """The answer in chunks: `async with client.stream(...) as stream: async for chunk in stream: ...`."""
        return AsyncAnswerStream(self, exchange.CHAT, exchange.chat_body(messages, options, stream=True))

    async def complete(self, prompt: str | Sequence[int], **options: Unpack[SamplingOptions]) -> Answer:
        """What follows a text or its tokens."""
        body = exchange.completion_body(prompt, options, stream=False)
        return exchange.answer_of(await self._send("POST", exchange.COMPLETIONS, body))

    def stream_complete(self, prompt: str | Sequence[int], **options: Unpack[SamplingOptions]) -> AsyncAnswerStream:
        body = exchange.completion_body(prompt, options, stream=True)
        return AsyncAnswerStream(self, exchange.COMPLETIONS, body)

    async def models(self) -> list[ModelCard]:
        return msgspec.json.decode(await self._send("GET", "/v1/models"), type=exchange.ModelPage).data

    async def health(self) -> Health:
        """States of the processes, also while the server is not ready."""
        return exchange.health_of(await self._response("GET", "/health"))

    async def cache(self) -> CacheState:
        return msgspec.json.decode(await self._send("GET", "/v1/cache"), type=CacheState)

    async def clear_cache(self) -> CacheState:
        """Drop every cached prefix."""
        return msgspec.json.decode(await self._send("DELETE", "/v1/cache"), type=CacheState)

    async def metrics(self) -> str:
        """The Prometheus page."""
        return (await self._send("GET", "/metrics")).decode()

    async def restart(self, role: str) -> int:
        """As `Client.restart`."""
        return restart(self.url, role)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        return exchange.check(await self._response(method, path, body))

    async def _response(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, content=body, headers=exchange.JSON)
        except httpx.HTTPError as error:
            raise exchange.unreachable(self.url, error) from error


class AsyncAnswerStream:
    """Chunks of one answer; `answer` is what has come so far. The request is sent by the `async with`."""

    def __init__(self, client: AsyncClient, path: str, body: bytes) -> None:
        self._reader = exchange.ChunkReader()
        self._chunks: list[Chunk] = []
        self._url = client.url
        self._open = AsyncExitStack()
        self._request = client._http.stream("POST", path, content=body, headers=exchange.JSON)
        self._lines: AsyncIterator[str] | None = None

    @property
    def answer(self) -> Answer:
        return exchange.joined(self._reader, self._chunks)

    async def __aenter__(self) -> Self:
        try:
            response = await self._open.enter_async_context(self._request)
            if response.status_code != 200:
                await response.aread()
                exchange.check(response)
        except BaseException as error:
            await self._open.aclose()
            if isinstance(error, httpx.HTTPError):  # also where the body of an error cannot be read
                raise exchange.unreachable(self._url, error) from error
            raise
        self._lines = response.aiter_lines()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        assert self._lines is not None, "a stream is read inside of its `async with`"
        try:
            while not self._reader.is_done:
                line = await anext(self._lines, None)
                if line is None:
                    raise Unavailable(f"{self._url} ended the stream before its end")
                chunk = self._reader.feed(line)
                if chunk is not None:
                    self._chunks.append(chunk)
                    return chunk
        except httpx.HTTPError as error:
            raise exchange.unreachable(self._url, error) from error
        raise StopAsyncIteration

    async def close(self) -> None:
        """Close the connection: a server that is still generating stops."""
        self._reader.is_done = True
        await self._open.aclose()
