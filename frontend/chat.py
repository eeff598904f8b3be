"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import logprobs
from frontend.answer import Answer, check_stream_options, respond
from frontend.generation import TokenText, prepare
from frontend.prompts import render_chat
from frontend.schemas import ChatBody, openapi_body, parse
from frontend.service import read_body, service_of
from shared.errors import InvalidRequest

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=openapi_body(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Continue a conversation."""
    service = service_of(request)
    body = parse(await read_body(request), ChatBody)
    service.check_model(body.model)
    _check(body)
    service.engine.require_target()  # before the work of tokenizing
    prompt = await render_chat(service, body.messages, tools=body.tools, kwargs=body.chat_template_kwargs)
    has_new_name = body.max_completion_tokens is not None
    generation = prepare(
        service,
        request,
        body,
        [prompt],
        max_tokens=body.max_completion_tokens if has_new_name else body.max_tokens,
        max_tokens_param="max_completion_tokens" if has_new_name else "max_tokens",
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        is_chat=True,
    )
    return await respond(request, body, generation, ChatAnswer(service, body, generation))


def _check(body: ChatBody) -> None:
    check_stream_options(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    if body.tools and body.tool_choice != "none":
        raise InvalidRequest("tools: tool calls are not supported yet; only tool_choice 'none' is", param="tools")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens: give max_tokens or max_completion_tokens, not both", param="max_tokens")


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choice(self, text: str, tokens: list[TokenText]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(tokens)}

    def chunk_choice(self, text: str, tokens: list[TokenText]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(tokens)}

    def text_template(self) -> tuple[bytes, bytes]:
        return b'"delta":{"content":', b'},"logprobs":null'

    def first_choice(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _logprobs(self, tokens: list[TokenText]) -> dict[str, Any] | None:
        return {"content": logprobs.chat_entries(tokens, self.pieces), "refusal": None} if tokens else None
