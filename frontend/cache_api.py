"""GET and DELETE /v1/cache: what the prefix cache holds and how much it gives, and emptying it."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend.errors import json_response
from frontend.service import service_of
from shared.errors import Unavailable
from shared.messages import CacheReply

router = APIRouter()

MAX_SALT_CHARS = 256


def cache_salt(request: Request) -> str:
    """The header X-Cache-Tenant: requests with different ones share no cached blocks."""
    return request.headers.get("x-cache-tenant", "")[:MAX_SALT_CHARS]


@router.get("/v1/cache")
async def read(request: Request) -> Response:
    """Blocks and bytes of each tier, hits in tokens, evictions, misses by reason, self-checks."""
    return await _answer(request, clear=False)


@router.delete("/v1/cache")
async def clear(request: Request) -> Response:
    """Drop every cached block that no running request is about to read, the archived ones too."""
    return await _answer(request, clear=True)


async def _answer(request: Request, clear: bool) -> Response:
    reply = await service_of(request).engine.prefix_cache(clear)
    if reply is None:
        raise Unavailable("the scheduler does not answer", retry_after_s=2.0)
    content = {"object": "cache", **described(reply)}
    if clear:
        content["cleared_blocks"] = reply.cleared_blocks
    return json_response(msgspec.json.encode(content))


def described(reply: CacheReply) -> dict[str, object]:
    if not reply.enabled:
        return {"enabled": False}
    return {
        "enabled": True,
        "block_size": reply.block_size,
        "tiers": {
            tier: {"entries": num_blocks, "bytes": reply.tier_bytes.get(tier, 0)}
            for tier, num_blocks in reply.blocks.items()
        },
        "capacity_blocks": reply.capacity_blocks,
        "query_tokens": reply.query_tokens,
        "hit_tokens": reply.hit_tokens,
        "hit_rate": reply.hit_tokens / reply.query_tokens if reply.query_tokens else 0.0,
        "evictions": reply.evictions,
        "misses": reply.misses,
        "checks": reply.checks,
    }
