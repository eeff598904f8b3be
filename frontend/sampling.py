"""A request's fields and the model's defaults, as SamplingParams for each of its sequences."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from frontend.schemas import GenerationBody
from shared.errors import ContextLength, InvalidRequest
from shared.messages import SamplingParams

SEED_MASK = (1 << 63) - 1

# field of SamplingParams -> (OpenAI's default, its type); generation_config.json uses the same names
_DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def for_sequences(
    body: GenerationBody, defaults: Mapping[str, Any], vocab_size: int, num_logprobs: int | None
) -> list[SamplingParams]:
    """The parameters of the request's n sequences: equal but for the seed.

    Args:
        defaults: generation_config.json's content, empty where there is none.

    Raises:
        InvalidRequest: logit_bias names a token that does not exist.
    """
    values: dict[str, Any] = {}
    for name, openai_default in _DEFAULTS.items():
        value = getattr(body, name)
        if value is None:
            value = defaults.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            value = openai_default
        values[name] = max(0, int(value)) if name == "top_k" else float(value)
    first = SamplingParams(
        **values,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        seed=secrets.randbits(63) if body.seed is None else body.seed & SEED_MASK,
        is_seeded=body.seed is not None,
        num_logprobs=num_logprobs,
    )
    return [first] + [msgspec.structs.replace(first, seed=mix_seed(first.seed, i)) for i in range(1, body.n)]


def mix_seed(seed: int, index: int) -> int:
    """The seed of sequence `index`: `seed` itself for 0, otherwise far from it and from every other index.

    Source: the output function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return (z ^ z >> 31) & SEED_MASK


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    result = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and int(key) < vocab_size):
            raise InvalidRequest(f"logit_bias: {key!r} is not a token id below {vocab_size}", param=f"logit_bias.{key}")
        result[int(key)] = value
    return result


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param}: {token_id} is not a token id below {vocab_size}", param=param)


def output_limit(requested: int | None, num_prompt_tokens: int, max_model_len: int, param: str) -> int:
    """Output tokens that a sequence may have: `requested`, or the rest of the context.

    Raises:
        ContextLength: prompt and output do not fit.
    """
    room = max_model_len - num_prompt_tokens
    if requested is None:
        if room < 1:
            raise ContextLength(
                f"this model's context is {max_model_len} tokens; the prompt alone has {num_prompt_tokens}"
            )
        return room
    if requested > room:
        raise ContextLength(
            f"this model's context is {max_model_len} tokens; the request needs {num_prompt_tokens + requested} "
            f"({num_prompt_tokens} in the prompt, {requested} in {param})",
            param=param,
        )
    return requested
