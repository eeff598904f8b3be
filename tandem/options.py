"""What a caller may say of one generation: the fields of the HTTP API by their names, and a few shorter ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

Path = str | PathLike[str]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Message = Mapping[str, Any]
"""{"role": "user", "content": "..."} and the other forms of OpenAI's chat messages."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn and where an output ends. What is not given is the model's own default, then OpenAI's."""

    adapter: str  # the name of a LoRA adapter that was loaded with the model; default: the model itself
    max_tokens: int  # default: what the context holds
    min_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]  # token id -> -100..100
    seed: int  # with it the output is a function of the request, whatever else runs
    stop: str | Sequence[str]  # the output ends before it
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    skip_special_tokens: bool
    priority: int  # smaller runs first
    logprobs: bool
    top_logprobs: int  # 0..20, with logprobs
    response_format: Mapping[str, Any]
    structured_outputs: Mapping[str, Any]
    json_schema: Mapping[str, Any]  # these four: short for structured_outputs with one of them
    regex: str
    choice: Sequence[str]
    grammar: str  # Lark or EBNF


class ChatOptions(SamplingOptions, total=False):
    """Beside those: what only a conversation can have."""

    enable_thinking: bool
    reasoning_effort: Effort
    thinking_budget: int  # tokens of reasoning before it is closed
    thinking_start_token: str
    thinking_end_token: str
    tools: Sequence[Mapping[str, Any]]  # as OpenAI's API has them
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any]


class Options(ChatOptions, total=False):
    """Beside those: media of the last user message, by path or URL, in this order before its text."""

    images: Sequence[Path]
    videos: Sequence[Path]
    audio: Sequence[Path]
