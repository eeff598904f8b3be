"""Requests and answers as bytes, without a connection: what the two clients share."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shared import config
from shared.errors import (
    HTTP_STATUS,
    Busy,
    DeadlineExceeded,
    EngineFailure,
    Forbidden,
    InvalidRequest,
    NotFound,
    TandemError,
    TooLarge,
    TooSlow,
    Unavailable,
    from_code,
)
from tandem.client.answers import Answer, Chunk, Health, ModelCard
from tandem.fields import attach, expand, is_url, paths_of
from tandem.results import Stats, ToolCall

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
TIMEOUT_S = 600.0  # of one answer, or between two of its events
_BY_STATUS: dict[int, type[TandemError]] = {
    400: InvalidRequest, 401: Forbidden, 403: Forbidden, 404: NotFound, 408: TooSlow, 413: TooLarge, 429: Busy,
    503: Unavailable, 504: DeadlineExceeded,
}  # fmt: skip


def address(url: str | None) -> str:
    """The server's, without /v1; by default the one that `tandem serve` has with this environment's settings."""
    if url is None:
        settings = config.load()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{settings.port}"
    return url.rstrip("/").removesuffix("/v1")


def headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


class ModelPage(msgspec.Struct):
    data: list[ModelCard]


# ---------------------------------------------------------------- requests


def chat_body(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, stream: bool) -> bytes:
    """Raises InvalidRequest: a file cannot be read, or there is no message for it."""
    fields = expand(options)
    media = [_image(*item) for item in paths_of(fields.pop("images", ()), "images")]
    media += [_video(*item) for item in paths_of(fields.pop("videos", ()), "videos")]
    media += [_audio(*item) for item in paths_of(fields.pop("audio", ()), "audio")]
    return _encode({"model": "default", **fields, "messages": attach(messages, media)}, stream=stream)


def completion_body(prompt: str | Sequence[int], options: Mapping[str, Any], *, stream: bool) -> bytes:
    fields = expand(options)
    top = fields.pop("top_logprobs", 0)
    if fields.pop("logprobs", False):
        fields["logprobs"] = top
    text = prompt if isinstance(prompt, str) else list(prompt)
    return _encode({"model": "default", **fields, "prompt": text}, stream=stream)


def _encode(fields: dict[str, Any], *, stream: bool) -> bytes:
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(fields)


def _image(path: str, place: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": path if is_url(path) else _data_uri(path, place)}}


def _video(path: str, place: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": path if is_url(path) else _data_uri(path, place)}}


def _audio(path: str, place: str) -> dict[str, Any]:
    if is_url(path):
        raise InvalidRequest(f"{place}: audio is sent as a file, not as a URL", param=place)
    return {"type": "input_audio", "input_audio": {"data": _data_uri(path, place)}}


def _data_uri(path: str, place: str) -> str:
    file = Path(path).expanduser()
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(f"{place}: {file}: {error.strerror}", param=place) from error
    return f"data:{mimetypes.guess_type(file.name)[0] or 'application/octet-stream'};base64,{data}"


# ---------------------------------------------------------------- answers


def check(response: httpx.Response) -> bytes:
    """The body of an answer that was read.

    Raises:
        TandemError: the server refused or failed; the kind is that of its status and code.
    """
    if response.status_code == 200:
        return response.content
    raise _error(response.content, response.status_code, response.headers.get("retry-after"))


def _error(content: bytes, status: int, retry_after: str | None = None) -> TandemError:
    try:
        told = msgspec.json.decode(content)["error"]
        message, param, code = str(told["message"]), told.get("param"), told.get("code")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        message, param, code = f"the server answered {status}", None, None
    wait_s = float(retry_after) if retry_after and retry_after.isdigit() else None
    if code in HTTP_STATUS:
        error = from_code(code, message, wait_s)
        if HTTP_STATUS[error.code] == status:
            error.param = param
            return error
    return _BY_STATUS.get(status, EngineFailure)(message, param=param, retry_after_s=wait_s)


def health_of(response: httpx.Response) -> Health:
    """The server tells its state with 503 too, while it is not ready."""
    if response.status_code not in (200, 503):
        check(response)
    try:
        return msgspec.json.decode(response.content, type=Health)
    except msgspec.MsgspecError as error:
        raise Unavailable(f"{response.url} is not a Tandem server's: {error}") from error


def unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    if isinstance(error, httpx.ConnectError):
        return Unavailable(f"no server answers at {url} (`tandem serve` starts one): {error}")
    return Unavailable(f"the connection to {url} failed: {error or type(error).__name__}")


def answer_of(content: bytes) -> Answer:
    """A chat completion or a plain one."""
    body = msgspec.json.decode(content)
    choice = body["choices"][0]
    message = choice.get("message") or {"content": choice.get("text")}
    return Answer(
        id=body["id"],
        model=body["model"],
        text=message.get("content") or "",
        reasoning=message.get("reasoning_content") or "",
        tool_calls=[_call(call) for call in message.get("tool_calls") or ()],
        finish_reason=choice["finish_reason"],
        logprobs=_logprobs(choice),
        stats=_stats(body.get("usage"), body.get("timings")),
    )


def _call(call: dict[str, Any]) -> ToolCall:
    return ToolCall(call_id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """Chat's entries; a plain completion's parallel lists as such entries."""
    block = choice.get("logprobs") or {}
    if "tokens" not in block:
        return list(block.get("content") or ())
    rows = zip(block["tokens"], block["token_logprobs"], block["top_logprobs"], strict=True)
    return [
        {"token": token, "logprob": logprob, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}
        for token, logprob, top in rows
    ]


def _stats(usage: dict[str, Any] | None, timings: dict[str, Any] | None) -> Stats:
    counts, times = usage or {}, timings or {}
    return Stats(
        num_prompt_tokens=counts.get("prompt_tokens", 0),
        num_cached_tokens=(counts.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        num_output_tokens=counts.get("completion_tokens", times.get("predicted_n", 0)),
        num_draft_tokens=times.get("draft_n", 0),
        num_accepted_tokens=times.get("draft_n_accepted", 0),
        queue_s=times.get("queue_ms", 0.0) / 1e3,
        prefill_s=times.get("prompt_ms", 0.0) / 1e3,
        decode_s=times.get("predicted_ms", 0.0) / 1e3,
    )


class ChunkReader:
    """Lines of a streamed answer to chunks; the last one waits for the counters that follow it."""

    def __init__(self) -> None:
        self.id = self.model = ""
        self.is_done = False
        self._calls: dict[int, ToolCall] = {}
        self._last: Chunk | None = None
        self._timings: dict[str, Any] | None = None
        self._usage: dict[str, Any] | None = None

    def feed(self, line: str) -> Chunk | None:
        """Raises TandemError: the server could not finish the answer."""
        if not line.startswith("data: "):
            return None
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.is_done = True
            return msgspec.structs.replace(
                self._last or Chunk(), tool_calls=list(self._calls.values()), stats=_stats(self._usage, self._timings)
            )
        event = msgspec.json.decode(data)
        if "error" in event:
            code = event["error"].get("code") or EngineFailure.code
            raise _error(data.encode(), HTTP_STATUS.get(code, 500))
        self.id, self.model = event["id"], event["model"]
        self._usage = event.get("usage") or self._usage
        self._timings = event.get("timings") or self._timings
        return self._chunk(event["choices"][0]) if event["choices"] else None

    def _chunk(self, choice: dict[str, Any]) -> Chunk | None:
        delta = choice.get("delta") or {"content": choice.get("text")}
        for call in delta.get("tool_calls") or ():
            known = self._calls.get(call["index"])
            more = call["function"].get("arguments") or ""
            if known is None:
                self._calls[call["index"]] = ToolCall(call_id=call["id"], name=call["function"]["name"], arguments=more)
            else:
                self._calls[call["index"]] = msgspec.structs.replace(known, arguments=known.arguments + more)
        chunk = Chunk(
            text=delta.get("content") or "",
            reasoning=delta.get("reasoning_content") or "",
            logprobs=_logprobs(choice),
            finish_reason=choice.get("finish_reason"),
        )
        if chunk.finish_reason is not None:
            self._last = chunk
            return None
        return chunk if chunk.text or chunk.reasoning or chunk.logprobs else None


def joined(reader: ChunkReader, chunks: Sequence[Chunk]) -> Answer:
    """The chunks so far as an answer."""
    last = chunks[-1] if chunks else Chunk()
    return Answer(
        id=reader.id,
        model=reader.model,
        text="".join(chunk.text for chunk in chunks),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        tool_calls=last.tool_calls,
        finish_reason=last.finish_reason,
        logprobs=[entry for chunk in chunks for entry in chunk.logprobs],
        stats=last.stats or Stats(),
    )
