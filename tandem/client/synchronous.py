"""The client for code without an event loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Self, Unpack

import httpx
import msgspec

from shared.errors import Unavailable
from tandem.client import exchange
from tandem.client.answers import Answer, CacheState, Chunk, Health, ModelCard
from tandem.client.control import restart
from tandem.options import Message, Options, SamplingOptions


class Client:
    """One server. Threads may share it.

    Args:
        url: of the server; by default where `tandem serve` listens with the settings of this environment.
        api_key: one of the server's, where it has some; the admin key for `clear_cache`, where it has one.
        timeout_s: for an answer, or for the next part of a streamed one.

    All methods raise Unavailable where no server answers, and otherwise the error that the server tells of: Busy with
    `retry_after_s`, InvalidRequest with `param`, EngineFailure and so on.
    """

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, timeout_s: float = exchange.TIMEOUT_S
    ) -> None:
        self.url = exchange.address(url)
        self._http = httpx.Client(base_url=self.url, headers=exchange.headers(api_key), timeout=timeout_s)

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """The answer to a conversation. `images`, `videos` and `audio` are sent with it."""
        return exchange.answer_of(self._post(exchange.CHAT, exchange.chat_body(messages, options, stream=False)))

    def stream(self, messages: Sequence[Message], **options: Unpack[Options]) -> AnswerStream:
        """The answer in chunks. Leaving the `with` of it stops the server's work on the rest."""
        return AnswerStream(self, exchange.CHAT, exchange.chat_body(messages, options, stream=True))

    def complete(self, prompt: str | Sequence[int], **options: Unpack[SamplingOptions]) -> Answer:
        """What follows a text or its tokens."""
        body = exchange.completion_body(prompt, options, stream=False)
        return exchange.answer_of(self._post(exchange.COMPLETIONS, body))

    def stream_complete(self, prompt: str | Sequence[int], **options: Unpack[SamplingOptions]) -> AnswerStream:
        return AnswerStream(self, exchange.COMPLETIONS, exchange.completion_body(prompt, options, stream=True))

    def models(self) -> list[ModelCard]:
        return msgspec.json.decode(self._send("GET", "/v1/models"), type=exchange.ModelPage).data

    def health(self) -> Health:
        """States of the processes, also while the server is not ready."""
        return exchange.health_of(self._response("GET", "/health"))

    def cache(self) -> CacheState:
        return msgspec.json.decode(self._send("GET", "/v1/cache"), type=CacheState)

    def clear_cache(self) -> CacheState:
        """Drop every cached prefix."""
        return msgspec.json.decode(self._send("DELETE", "/v1/cache"), type=CacheState)

    def metrics(self) -> str:
        """The Prometheus page."""
        return self._send("GET", "/metrics").decode()

    def restart(self, role: str) -> int:
        """Replace "target", "drafter" or "scheduler" of a server on this machine; streams pause and go on.

        Returns:
            The process id of its supervisor.
        """
        return restart(self.url, role)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, path: str, body: bytes) -> bytes:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        return exchange.check(self._response(method, path, body))

    def _response(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        try:
            return self._http.request(method, path, content=body, headers=exchange.JSON)
        except httpx.HTTPError as error:
            raise exchange.unreachable(self.url, error) from error


class AnswerStream:
    """Chunks of one answer; `answer` is what has come so far, or the whole of it after the last chunk."""

    def __init__(self, client: Client, path: str, body: bytes) -> None:
        self._reader = exchange.ChunkReader()
        self._chunks: list[Chunk] = []
        self._url = client.url
        self._open = ExitStack()
        request = client._http.stream("POST", path, content=body, headers=exchange.JSON)
        try:
            response = self._open.enter_context(request)
            if response.status_code != 200:
                response.read()
                exchange.check(response)
        except BaseException as error:
            self._open.close()
            if isinstance(error, httpx.HTTPError):  # also where the body of an error cannot be read
                raise exchange.unreachable(self._url, error) from error
            raise
        self._lines = response.iter_lines()

    @property
    def answer(self) -> Answer:
        return exchange.joined(self._reader, self._chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        try:
            while not self._reader.is_done:
                line = next(self._lines, None)
                if line is None:
                    raise Unavailable(f"{self._url} ended the stream before its end")
                chunk = self._reader.feed(line)
                if chunk is not None:
                    self._chunks.append(chunk)
                    return chunk
        except httpx.HTTPError as error:
            raise exchange.unreachable(self._url, error) from error
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Close the connection: a server that is still generating stops."""
        self._reader.is_done = True
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
