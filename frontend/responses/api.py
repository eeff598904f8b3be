"""/v1/responses: create, retrieve, delete, cancel, input items, token counts, compaction."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend.answer import ACCEPT_WAIT_S, respond
from frontend.caller import caller_of
from frontend.chat import parsing_of
from frontend.errors import json_response
from frontend.generation import ClientWatcher, Generation, prepare
from frontend.grammar import grammar_for
from frontend.responses import compact
from frontend.responses.constraints import answer_of, calls_of
from frontend.responses.context import Prompt, encode, load
from frontend.responses.event_log import EventLog, Reader
from frontend.responses.items import shown
from frontend.responses.run import ResponseRun, event_bytes
from frontend.responses.schemas import (
    CompactBody,
    ContextBody,
    InputItemsQuery,
    InputTokensBody,
    ResponsesBody,
    RetrieveQuery,
)
from frontend.responses.schemas import prepare as prepare_body
from frontend.schemas import GenerationBody, openapi_body, openapi_query, parse, parse_query
from frontend.service import Service, read_body, service_of
from frontend.sse import EventStream
from frontend.thinking import thinking_for
from shared.errors import InvalidRequest, TandemError
from shared.messages import Grammar

router = APIRouter()


@router.post("/v1/responses", openapi_extra=openapi_body(ResponsesBody))
async def create(request: Request) -> Response:
    """Continue a conversation."""
    service = service_of(request)
    body = parse(await read_body(request), ResponsesBody, prepare_body)
    service.check_model(body.model)
    _check(body)
    target = service.engine.require_target()
    limit = target.max_model_len
    context = await load(service, _tenant(request), body)
    num_output = min(body.max_output_tokens or limit // 8, limit // 2)
    prompt = await encode(service, body, context, num_output=num_output)
    grammar = await grammar_for(
        service.grammars,
        target,
        prompt.thinking.output_format,
        answer=answer_of(body.text),
        calls=calls_of(body, context.table, prompt.tools),
    )
    generation_body = GenerationBody(
        model=body.model, stream=body.stream, temperature=body.temperature, top_p=body.top_p
    )
    has_logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in body.include
    generation = _prepared(
        request,
        generation_body,
        prompt,
        max_tokens=body.max_output_tokens,
        max_calls=None if body.parallel_tool_calls else 1,
        num_logprobs=(body.top_logprobs or 0) if has_logprobs else None,
        grammar=grammar,
    )
    run = ResponseRun(service, body, context, generation)
    if not body.background:
        return await respond(request, generation_body, generation, run)
    generation.start()
    try:
        await generation.wait_accepted(ACCEPT_WAIT_S)
        await run.save(is_running=True)
    except BaseException:
        generation.close()
        raise
    queued = run.stored().response
    service.responses.begin(run)
    events = service.responses.start_background(run)
    return _follow(request, events, 0) if body.stream else json_response(msgspec.json.encode(queued))


@router.get("/v1/responses/{response_id}", openapi_extra=openapi_query(RetrieveQuery))
async def retrieve(request: Request, response_id: str) -> Response:
    """A response as it is now; `stream` follows one that runs in the background, from its events so far."""
    responses, tenant = service_of(request).responses, _tenant(request)
    query = parse_query(request.query_params, RetrieveQuery)
    found = await responses.find(tenant, response_id)
    if query.starting_after is not None and not query.stream:
        raise InvalidRequest("starting_after: needs stream to be true", param="starting_after")
    if not query.stream:
        return json_response(msgspec.json.encode(found.response))
    events = responses.events(tenant, response_id)
    if events is None:
        raise InvalidRequest(
            "stream: only the events of background responses are kept, and those of the last ones; "
            "retrieve this one without stream",
            param="stream",
        )
    return _follow(request, events, 0 if query.starting_after is None else query.starting_after + 1)


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    """Forget a response."""
    await service_of(request).responses.delete(_tenant(request), response_id)
    return json_response(msgspec.json.encode({"id": response_id, "object": "response", "deleted": True}))


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    """Stop a response that is being made."""
    stored = await service_of(request).responses.cancel(_tenant(request), response_id)
    return json_response(msgspec.json.encode(stored.response))


@router.get("/v1/responses/{response_id}/input_items", openapi_extra=openapi_query(InputItemsQuery))
async def input_items(request: Request, response_id: str) -> Response:
    """The items that a response was made from, those of earlier responses included, in pages."""
    responses, tenant = service_of(request).responses, _tenant(request)
    query = parse_query(request.query_params, InputItemsQuery)
    found = await responses.find(tenant, response_id)
    listed: list[dict[str, Any]] = []
    previous_id = found.response["previous_response_id"]
    if previous_id is not None:
        for stored in await responses.history(tenant, previous_id):
            listed += [*stored.input_items, *stored.response["output"]]
    listed += found.input_items
    if query.order == "desc":
        listed.reverse()
    if query.after is not None:
        places = [i for i, item in enumerate(listed) if item["id"] == query.after]
        if not places:
            raise InvalidRequest(f"after: this response has no item {query.after!r}", param="after")
        listed = listed[places[0] + 1 :]
    page = [shown(item) for item in listed[: query.limit]]
    answer = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(listed) > query.limit,
    }
    return json_response(msgspec.json.encode(answer))


@router.post("/v1/responses/input_tokens", openapi_extra=openapi_body(InputTokensBody))
async def input_tokens(request: Request) -> Response:
    """How many tokens the prompt of such a request has."""
    service = service_of(request)
    body = parse(await read_body(request), InputTokensBody, prepare_body)
    service.check_model(body.model)
    _check(body)
    prompt = await encode(service, body, await load(service, _tenant(request), body), num_output=1)
    answer = {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
    return json_response(msgspec.json.encode(answer))


@router.post("/v1/responses/compact", openapi_extra=openapi_body(CompactBody))
async def compact_conversation(request: Request) -> Response:
    """A conversation made short. What does not fit into the context with its summary is left out from its beginning."""
    service = service_of(request)
    body = msgspec.structs.replace(parse(await read_body(request), CompactBody, prepare_body), truncation="auto")
    service.check_model(body.model)
    _check(body)
    context = await load(service, _tenant(request), body)
    context = msgspec.structs.replace(context, key=await service.responses.store.key())
    num_output = max(1, service.engine.require_target().max_model_len // 8)
    prompt = await encode(service, body, context, num_output=num_output, ask=compact.ASK)
    generation = _prepared(
        request,
        GenerationBody(model=body.model),
        msgspec.structs.replace(prompt, tools=None),  # what looks like a call is a part of the summary
        max_tokens=num_output,
        max_calls=None,
        num_logprobs=None,
    )
    generation.start()
    watcher = ClientWatcher(request, generation)
    try:
        answer = await compact.compacted(context, generation)
    finally:
        watcher.close()
    return json_response(msgspec.json.encode(answer))


# ---------------------------------------------------------------- what they share


def _tenant(request: Request) -> str:
    tenant: str = request.scope.get("tenant", "")
    return tenant


def _check(body: ContextBody) -> None:
    if body.reasoning is not None and body.reasoning.summary and body.reasoning.generate_summary:
        raise InvalidRequest("reasoning.generate_summary: it is the former name of summary; give one of them",
                             param="reasoning.generate_summary")  # fmt: skip
    if not isinstance(body, ResponsesBody):
        return
    if body.background and not body.store:
        raise InvalidRequest("background: needs store to be true", param="background")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: needs stream to be true", param="stream_options")


def _prepared(
    request: Request,
    body: GenerationBody,
    prompt: Prompt,
    *,
    max_tokens: int | None,
    max_calls: int | None,
    num_logprobs: int | None,
    grammar: Grammar | None = None,
) -> Generation:
    """`max_tokens` beyond the context is cut to what is left of it."""
    service: Service = service_of(request)
    caller = caller_of(request)
    room = service.engine.require_target().max_model_len - len(prompt.token_ids)
    return prepare(
        service,
        caller,
        body,
        [prompt.token_ids],
        media=prompt.media,
        max_tokens=min(max_tokens or room, room),
        max_tokens_param="max_output_tokens",
        num_logprobs=num_logprobs,
        parsing=parsing_of(
            caller,
            prompt.text,
            prompt.tools,
            max_calls=max_calls,
            output_format=prompt.thinking.output_format,
        ),
        grammar=grammar,
        thinking=thinking_for(service, prompt.thinking, prompt.text, has_grammar=grammar is not None),
    )


def _follow(request: Request, events: EventLog, start: int) -> Response:
    reader = Reader(events, start)
    return EventStream(reader.events(), ClientWatcher(request, reader), _error_event, b"")


def _error_event(error: TandemError) -> bytes:
    return event_bytes({"type": "error", "code": error.code, "message": error.message, "param": error.param})
