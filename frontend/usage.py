"""The `usage` and `timings` blocks of an answer."""

from __future__ import annotations

from typing import Any

from frontend.generation import Generation
from shared.messages import Timings


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's token counts. A prompt counts once, however many outputs were asked for."""
    firsts = generation.outputs[:: generation.n]
    num_prompt = sum(len(text.submit.prompt_token_ids) for text in firsts)
    num_output = sum(text.num_tokens for text in generation.outputs)
    num_cached = sum(text.timings.num_cached_tokens for text in firsts if text.timings is not None)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def timings(generation: Generation) -> dict[str, Any] | None:
    """llama.cpp's names: counts are sums over the request's sequences, times those of the slowest one.

    None when the engine reported nothing (a stop that it did not confirm in time).
    """
    known = [text.timings for text in generation.outputs if text.timings is not None]
    if not known:
        return None
    prompt_ms = 1e3 * max(t.prefill_s for t in known)
    predicted_ms = 1e3 * max(t.decode_s for t in known)
    num_computed = sum(_num_computed(t) for t in known)
    num_output = sum(text.num_tokens for text in generation.outputs)
    return {
        "prompt_n": num_computed,
        "cache_n": sum(t.num_cached_tokens for t in known),
        "prompt_ms": prompt_ms,
        "prompt_per_second": 1e3 * num_computed / prompt_ms if prompt_ms > 0 else 0.0,
        "predicted_n": num_output,
        "predicted_ms": predicted_ms,
        "predicted_per_second": 1e3 * num_output / predicted_ms if predicted_ms > 0 else 0.0,
        "queue_ms": 1e3 * max(t.queue_s for t in known),
        "draft_n": sum(t.num_draft_tokens for t in known),
        "draft_n_accepted": sum(t.num_accepted_tokens for t in known),
    }


def _num_computed(t: Timings) -> int:
    return max(0, t.num_prompt_tokens - t.num_cached_tokens)
