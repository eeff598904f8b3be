"""What a server answers, as structs. Fields that a newer server adds are passed over."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from tandem.results import Stats, ToolCall


class Answer(Struct, frozen=True, kw_only=True):
    """A whole answer. `finish_reason` is "stop", "length" or "tool_calls"; None: it was stopped before its end."""

    id: str
    model: str
    text: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's entries, where they were asked for
    stats: Stats = Stats()


class Chunk(Struct, frozen=True, kw_only=True):
    """What one event adds to an answer. Calls and counters come with the last one."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    max_model_len: int | None = None  # tokens of prompt and output; None until a target has been ready once
    input_modalities: list[str] = field(default_factory=lambda: ["text"])


class Health(Struct, frozen=True, kw_only=True):
    """States of the engine's processes: "ready", "loading", "absent", "silent" or "unknown"."""

    status: str  # "ok" while a request would reach a ready target
    model: str
    scheduler: str
    target: str
    drafter: str
    num_running: int | None = None
    num_waiting: int | None = None
    num_open_requests: int = 0
    input_modalities: list[str] = field(default_factory=lambda: ["text"])
    attention: list[str] = field(default_factory=list)
    exactness: dict[str, Any] | None = None

    @property
    def is_ready(self) -> bool:
        return self.status == "ok"


class Tier(Struct, frozen=True, kw_only=True):
    entries: int
    bytes: int


class CacheState(Struct, frozen=True, kw_only=True):
    """The prefix cache since the scheduler's start: blocks by tier ("device", "host", "ssd"), hits in tokens."""

    enabled: bool
    block_size: int = 0
    capacity_blocks: int = 0
    tiers: dict[str, Tier] = field(default_factory=dict)
    query_tokens: int = 0
    hit_tokens: int = 0
    hit_rate: float = 0.0
    evictions: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    checks: dict[str, int] = field(default_factory=dict)
    cleared_blocks: int = 0  # by this call
