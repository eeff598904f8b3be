"""Settings of a model in this process: those of the server that are about the model and the engine, by their names."""

from __future__ import annotations

from typing import Any

import msgspec

from shared import config
from shared.config import FIELDS, Settings, Value, check, suggestion
from shared.errors import BadConfig

# The others are about HTTP, sockets, processes and the archive of the prefix cache, which there are none of here.
NAMES = (
    "model", "draft_model", "model_name", "draft_kind", "draft_block_size", "draft_max_batch", "draft_tokens", "ngram",
    "adapters", "dtype", "trust_remote_code", "tool_parser", "reasoning_parser", "thinking_start_token",
    "thinking_end_token", "enable_thinking", "cache_dir", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
    "kv_cache_bytes", "attention", "kv_layout", "prefix_cache", "prefix_cache_bytes", "prefix_check_rate", "max_queue",
    "memory_limit_bytes",
    "priority_ageing_s", "ttft_bound_s", "blas", "blas_threads", "allow_media_urls", "media_hosts", "media_roots",
    "media_max_bytes", "media_timeout_s",
)  # fmt: skip

NO_LIMIT = 1 << 31


def local_settings(model: str | None, draft_model: str | None, given: dict[str, Any]) -> Settings:
    """From the environment's `TANDEM_*` variables, then what the caller gives.

    Raises:
        BadConfig: a name is unknown or of the server only, or a value is of the wrong type.
    """
    named = {"model": model, "draft_model": draft_model}
    chosen: dict[str, Value] = {name: value for name, value in named.items() if value is not None}
    for name, value in given.items():
        if name not in NAMES:
            raise BadConfig(_refusal(name))
        is_switch = name == "enable_thinking" and isinstance(value, bool)
        chosen[name] = check(FIELDS[name], str(value).lower() if is_switch else value, name)
    return in_this_process(msgspec.structs.replace(config.load(), **chosen), chosen)


def in_this_process(settings: Settings, chosen: dict[str, Any]) -> Settings:
    """A server's settings without what only its processes can do.

    Nobody replaces a worker that hangs, and nothing is written to disk; requests are refused for being many only where
    that was `chosen`.
    """
    return msgspec.structs.replace(
        settings,
        step_timeout_s=float("inf"),
        prefix_ssd_bytes=0,
        prefix_host_bytes=0,
        max_queue=settings.max_queue if "max_queue" in chosen else NO_LIMIT,
    )


def _refusal(name: str) -> str:
    if name in FIELDS:
        return f"{name}: a setting of the server; a model in this process has no use for it"
    return f"{name}: unknown setting{suggestion(name, NAMES)}"
