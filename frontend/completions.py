"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import logprobs
from frontend.answer import Answer, check_stream_options, respond
from frontend.caller import Caller, caller_of
from frontend.generation import Generation, TokenText, prepare
from frontend.grammar import answer_of, grammar_for
from frontend.output_events import Event, joined_text
from frontend.output_parser import OutputFormat
from frontend.prompts import MAX_PROMPTS, encode_prompts
from frontend.schemas import CompletionBody, openapi_body, parse
from frontend.service import Service, read_body, service_of
from shared.errors import InvalidRequest

router = APIRouter()


@router.post("/v1/completions", openapi_extra=openapi_body(CompletionBody))
async def completions(request: Request) -> Response:
    """Continue one or more texts."""
    service = service_of(request)
    body = parse(await read_body(request), CompletionBody)
    service.check_model(body.model)
    check_stream_options(body)
    generation = await prepare_completion(service, caller_of(request), body)
    return await respond(request, body, generation, CompletionAnswer(service, body, generation))


async def prepare_completion(service: Service, caller: Caller, body: CompletionBody) -> Generation:
    """The sequences that go on with the prompts, ready to start.

    Raises:
        InvalidRequest: a field is out of place, or does not fit the model.
        Unavailable: no target is ready.
    """
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequest("best_of: only a value equal to n is supported", param="best_of")
    target = service.engine.require_target()  # before the work of tokenizing
    prompts = await encode_prompts(service, body.prompt)
    if len(prompts) * body.n > MAX_PROMPTS:
        raise InvalidRequest(f"n: {len(prompts)} prompts times n are more than {MAX_PROMPTS} outputs", param="n")
    answer = answer_of(body.response_format, body.structured_outputs)
    plain = OutputFormat(tools=None, reasoning=None, is_harmony=False)  # a text that goes on has no parts
    return prepare(
        service,
        caller,
        body,
        prompts,
        max_tokens=body.max_tokens,
        max_tokens_param="max_tokens",
        num_logprobs=body.logprobs,
        grammar=await grammar_for(service.grammars, target, plain, answer=answer),
    )


class CompletionAnswer(Answer):
    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole_choice(self, events: list[Event], tokens: list[TokenText]) -> dict[str, Any]:
        return self.chunk_choice(joined_text(events), tokens)

    def chunk_choice(self, text: str, tokens: list[TokenText]) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs.completion_block(tokens, self.pieces) if tokens else None}

    def text_template(self) -> tuple[bytes, bytes]:
        return b'"text":', b',"logprobs":null'
