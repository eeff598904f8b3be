"""What a request's prompt is made of: the stored conversation, its own items, its tools; and how it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from frontend.chat import usable_tools
from frontend.media.parts import MediaPart
from frontend.prompts import encode_chat, render_chat
from frontend.responses import items
from frontend.responses.constraints import thinking_of
from frontend.responses.items import AnyItem
from frontend.responses.output import new_id
from frontend.responses.prompt import (
    Placed,
    Unsealer,
    chat_messages,
    without_old_reasoning,
    without_oldest,
)
from frontend.responses.schemas import ContextBody
from frontend.responses.tools import ToolTable, table
from frontend.schemas import ChatMessage, Tool
from frontend.service import Service
from frontend.thinking import ThinkingPlan
from shared.errors import ContextLength, InvalidRequest, NotFound
from shared.messages import MediaItem

MAX_ITEMS = 100_000


class Context(Struct, frozen=True, kw_only=True):
    tenant: str
    key: bytes  # of seals
    placed: list[Placed]  # the stored conversation, then the request's own items
    new_items: list[dict[str, Any]]  # the latter, as they are stored
    table: ToolTable


class Prompt(Struct, frozen=True):
    text: str
    token_ids: list[int]
    tools: Sequence[Tool] | None  # that the model was told of
    thinking: ThinkingPlan
    media: Sequence[MediaItem] = ()


async def load(service: Service, tenant: str, body: ContextBody) -> Context:
    """Gather a request's items.

    Raises:
        InvalidRequest: an item, a tool or a reference that cannot be used.
        NotFound: no such previous response.
    """
    if body.input is None and body.previous_response_id is None and body.instructions is None:
        raise InvalidRequest("input: required field is missing", param="input")
    placed: list[Placed] = []
    if body.previous_response_id is not None:
        for stored in await service.responses.history(tenant, body.previous_response_id):
            past = [*stored.input_items, *stored.response["output"]]
            placed += [Placed(_parsed(item), "previous_response_id") for item in past]
    given: Sequence[AnyItem] = (
        [items.Message(role="user", content=[items.InputText(text=body.input)])]
        if isinstance(body.input, str)
        else body.input or []
    )
    if len(placed) + len(given) > MAX_ITEMS:
        raise InvalidRequest(f"input: the conversation has more than {MAX_ITEMS} items", param="input")
    own = [Placed(await _resolved(service, tenant, item, i), f"input[{i}]") for i, item in enumerate(given)]
    new_items: list[dict[str, Any]] = msgspec.to_builtins([entry.item for entry in own])
    for item in new_items:
        item.setdefault("id", new_id(item["type"]))
    placed += own
    if body.reasoning is not None and body.reasoning.context == "current_turn":
        placed = without_old_reasoning(placed)
    return Context(
        tenant=tenant,
        key=await service.responses.store.key() if _needs_key(placed, body) else b"",
        placed=placed,
        new_items=new_items,
        table=table(body.tools or [], body.tool_choice),
    )


def _needs_key(placed: Sequence[Placed], body: ContextBody) -> bool:
    """Requests that keep nothing do not touch the store's file."""
    return bool(getattr(body, "include", ())) or any(
        isinstance(entry.item, items.Reasoning | items.Compaction | items.CompactionSummary) for entry in placed
    )


def _parsed(item: dict[str, Any]) -> AnyItem:
    parsed: AnyItem = msgspec.convert(items.with_type(item), AnyItem)
    return parsed


async def _resolved(service: Service, tenant: str, item: AnyItem, index: int) -> AnyItem:
    if not isinstance(item, items.ItemReference):
        return item
    found = await service.responses.store.item(tenant, item.id) if item.id is not None else None
    if found is None:
        place = f"input[{index}].id"
        raise NotFound(f"{place}: there is no stored item {item.id!r} for this API key", param=place)
    return _parsed(found)


async def encode(service: Service, body: ContextBody, context: Context, *, num_output: int, ask: str = "") -> Prompt:
    """The prompt. With `truncation: auto` the oldest items are left out until `num_output` tokens fit after it.

    Args:
        ask: what the user says last, after all items.

    Raises:
        ContextLength: it does not fit.
    """
    tools = usable_tools(service, context.table.functions, is_off=False)
    thinking = thinking_of(service, body.reasoning)
    limit = service.engine.require_target().max_model_len
    unsealer = Unsealer(context.key, context.tenant)

    async def attempt(num_dropped: int) -> Prompt:
        messages = chat_messages(body.instructions, without_oldest(context.placed, num_dropped), unsealer)
        if ask:
            messages.append(ChatMessage(role="user", content=ask))
        if not messages:
            raise InvalidRequest("input: it is empty", param="input")
        parts: list[MediaPart] = []
        text = await render_chat(
            service, messages, tools=tools, kwargs=thinking.template_kwargs, media=parts, param="input"
        )
        token_ids, media = await encode_chat(service, text, parts, salt=context.tenant, param="input")
        return Prompt(text, token_ids, tools, thinking, media)

    async def fits(num_dropped: int) -> Prompt | None:
        try:
            prompt = await attempt(num_dropped)
        except ContextLength:
            return None
        return prompt if len(prompt.token_ids) + num_output <= limit else None

    if body.truncation == "disabled":
        prompt = await attempt(0)
        if len(prompt.token_ids) >= limit:
            raise ContextLength(
                f"input: it has {len(prompt.token_ids)} tokens; this model's context is {limit}, output included",
                param="input",
            )
        return prompt
    whole = await fits(0)
    if whole is not None:
        return whole
    # The fewest items to leave out; the last one stays.
    low, high = 1, len(context.placed) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        found = await fits(middle)
        if found is not None:
            best, high = found, middle - 1
        else:
            low = middle + 1
    if best is None:
        raise ContextLength(
            f"input: its last item alone does not fit into this model's context of {limit} tokens", param="input"
        )
    return best
