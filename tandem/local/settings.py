"""Settings of a model in this process: those of the server that are about the model and the engine, by their names."""

from __future__ import annotations

import difflib
from typing import Any

import msgspec

from shared import config
from shared.config import Settings
from shared.errors import BadConfig

# The others are about HTTP, sockets, processes and the archive of the prefix cache, which there are none of here.
NAMES = frozenset({
    "model_name", "draft_kind", "draft_block_size", "draft_tokens", "ngram", "dtype", "trust_remote_code",
    "tool_parser", "reasoning_parser", "thinking_start_token", "thinking_end_token", "enable_thinking", "cache_dir",
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_bytes", "attention", "prefix_cache",
    "prefix_cache_bytes", "prefix_check_rate", "max_queue", "memory_limit_bytes", "priority_ageing_s", "ttft_bound_s",
    "blas", "blas_threads", "allow_media_urls", "media_hosts", "media_roots", "media_max_bytes", "media_timeout_s",
})  # fmt: skip

_NO_LIMIT = 1 << 31
# Nothing is refused for being many, nobody replaces a worker that hangs, and nothing is written to disk.
_LOCAL = {
    "max_queue": _NO_LIMIT, "step_timeout_s": float("inf"), "prefix_ssd_bytes": 0, "prefix_host_bytes": 0,
}  # fmt: skip


def local_settings(model: str | None, draft_model: str | None, given: dict[str, Any]) -> Settings:
    """From the environment's `TANDEM_*` variables, then what the caller gives.

    Raises:
        BadConfig: a name is unknown or of the server only, or a value is of the wrong type.
    """
    for name in given:
        if name not in NAMES:
            raise BadConfig(_refusal(name))
    if isinstance(given.get("enable_thinking"), bool):
        given = given | {"enable_thinking": str(given["enable_thinking"]).lower()}
    named = {"model": model, "draft_model": draft_model}
    chosen = {name: value for name, value in named.items() if value is not None}
    try:
        values = msgspec.structs.asdict(config.load()) | _LOCAL | given | chosen
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise BadConfig(str(error)) from error


def _refusal(name: str) -> str:
    if name in Settings.__struct_fields__:
        return f"{name}: a setting of the server; a model in this process has no use for it"
    close = difflib.get_close_matches(name, NAMES, 1)
    return f"{name}: unknown setting" + (f"; did you mean {close[0]}?" if close else "")
