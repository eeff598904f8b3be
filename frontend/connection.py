"""A connection's limits, below HTTP: heads that are endless or never end, and clients that do not read.

uvicorn bounds neither; it offers its protocol class to be extended. A stream notices a client that does not read by
what piles up for it (`frontend/streams.py`); an answer that is complete, or needs no engine, has only this.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # request line and headers
MAX_HEADERS = 128
HEAD_TIMEOUT_S = 20.0
HEAD_TOO_LARGE = "tandem.head_too_large"
ABORT = "tandem.abort"  # in the scope: a function that cuts the connection without sending what waits


class Connection(HttpToolsProtocol):
    """Counts what arrives while a head is incomplete, and gives it so much time.

    A client that takes nothing of what waits for it for `slow_reader_s` is cut off.
    """

    slow_reader_s = 60.0
    _head_bytes = 0
    _is_head = True
    _head_timer: TimerHandle | None = None
    _reader_timer: TimerHandle | None = None
    _num_unread = 0  # bytes, when the timer began

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()  # its end waits in our buffer, perhaps for ever

    def _watch_reader(self) -> None:
        """From now on nothing is written until it reads, or another request is answered, which begins anew."""
        self._stop_watching()
        self._num_unread = self.transport.get_write_buffer_size()
        if self._num_unread:
            self._reader_timer = self.loop.call_later(self.slow_reader_s, self._judge_reader)

    def _judge_reader(self) -> None:
        is_quiet = self.flow.write_paused or self.cycle is None or self.cycle.response_complete
        if is_quiet and self.transport.get_write_buffer_size() >= self._num_unread:
            self.transport.abort()
        else:
            self._watch_reader()

    def _stop_watching(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def data_received(self, data: bytes) -> None:
        if self._is_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            # No request exists yet that could be answered properly.
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_head()
        cast("dict[str, object]", self.scope)[ABORT] = self.transport.abort

    def on_headers_complete(self) -> None:
        self._end_head()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            cast("dict[str, object]", self.scope)[HEAD_TOO_LARGE] = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_head, self._head_bytes = True, 0  # the next request's, if there is one; timed from its first byte

    def _begin_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)
        self._is_head = True

    def _end_head(self) -> None:
        self._is_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
