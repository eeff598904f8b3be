"""A conversation made short: its user messages, and one item that stands for all the rest.

The summary is the model's own. The item carries it signed; a later input that has the item gives it to the model.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from frontend.generation import Generation
from frontend.output_events import Event, Text, settle
from frontend.responses import items
from frontend.responses.context import Context
from frontend.responses.output import new_id
from frontend.responses.prompt import as_dicts
from frontend.responses.seal import seal
from frontend.usage import usage
from shared.errors import EngineFailure

ASK = (
    "The conversation has grown too long and will be replaced by a summary. Write that summary now, for an assistant "
    "who will go on with the work and sees nothing else of what was said. Give the user's goals and wishes, what was "
    "done and decided and why, the names of files, functions and commands that matter, results and errors of tools, "
    "and what remains to be done. Write the summary only."
)


async def compacted(context: Context, generation: Generation) -> dict[str, Any]:
    """Run a prepared generation of the summary and give the answer of /v1/responses/compact.

    Raises:
        EngineFailure: the model wrote nothing.
    """
    events: list[Event] = []
    async for deltas in generation.deltas():
        for delta in deltas:
            events += delta.events or [Text(delta.text)]
    summary = "".join(block.text for block in settle(events) if isinstance(block, Text)).strip()
    if not summary:
        raise EngineFailure("the model wrote no summary")
    told = [p.item for p in context.placed if isinstance(p.item, items.Message) and p.item.role == "user"]
    kept = [items.shown(item) for item in as_dicts(told)]
    for item in kept:
        item.setdefault("id", new_id("message"))
        item["status"] = "completed"
    sealed = seal(context.key, context.tenant, "compaction", summary)
    counts = usage(generation)
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*kept, {"id": new_id("compaction"), "type": "compaction", "encrypted_content": sealed}],
        "usage": {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        },
    }
