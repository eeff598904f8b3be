"""How a request wants the model to reason: on or off, how long, and between which markers."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from frontend import tokenizer
from frontend.output_parser import OutputFormat
from frontend.reasoning import ReasoningFormat
from frontend.service import Service
from frontend.tools import harmony
from shared.errors import InvalidRequest
from shared.messages import Thinking

# For models whose template does not know efforts: tokens of reasoning. The higher ones have no limit.
EFFORT_BUDGETS = {"minimal": 256, "low": 1024, "medium": 8192}
# Templates that know efforts know these three.
_TEMPLATE_EFFORTS = {"none": "low", "minimal": "low", "low": "low", "medium": "medium"}


class ThinkingRequest(Struct, frozen=True, kw_only=True):
    """What one request says of reasoning, in whatever API's words. None: nothing."""

    is_enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None
    start: str | None = None
    end: str | None = None


class ThinkingPlan(Struct, frozen=True, kw_only=True):
    """What follows from it: values for the chat template, markers for the parsers, a budget for the worker."""

    template_kwargs: dict[str, Any]
    output_format: OutputFormat
    budget: int | None
    is_off: bool  # the request does not want any


def plan(service: Service, request: ThinkingRequest) -> ThinkingPlan:
    """Raises InvalidRequest: a budget or a marker for a model that marks no reasoning, or an effort of such a model."""
    output_format = _with_markers(service, request)
    has_reasoning = markers(output_format) is not None
    knows_effort = service.template is not None and service.template.knows_effort
    is_enabled, budget = request.is_enabled, request.budget
    if is_enabled is None and service.settings.enable_thinking:
        is_enabled = service.settings.enable_thinking == "true"
    kwargs: dict[str, Any] = {}
    if budget is not None and not has_reasoning:
        raise InvalidRequest("thinking_budget: this model marks no reasoning", param="thinking_budget")
    if request.effort is not None:
        if knows_effort:
            kwargs["reasoning_effort"] = _TEMPLATE_EFFORTS.get(request.effort, "high")
        elif has_reasoning:
            is_enabled = request.effort != "none" if request.is_enabled is None else request.is_enabled
            budget = EFFORT_BUDGETS.get(request.effort) if budget is None else budget
        elif request.effort != "none":
            raise InvalidRequest("reasoning_effort: this model does not reason", param="reasoning_effort")
    if is_enabled is not None:
        kwargs["enable_thinking"] = is_enabled
    return ThinkingPlan(template_kwargs=kwargs, output_format=output_format, budget=budget, is_off=is_enabled is False)


def markers(output_format: OutputFormat) -> ReasoningFormat | None:
    return harmony.REASONING if output_format.is_harmony else output_format.reasoning


def _with_markers(service: Service, request: ThinkingRequest) -> OutputFormat:
    """The model's output format with the request's own markers."""
    output_format = service.output_format
    if request.start is None and request.end is None:
        return output_format
    if output_format.is_harmony:
        raise InvalidRequest("thinking_start_token: this model's output format is fixed", param="thinking_start_token")
    known = output_format.reasoning
    start = request.start or (known.start if known is not None else None)
    end = request.end or (known.end if known is not None else None)
    if start is None or end is None:
        missing = "thinking_start_token" if start is None else "thinking_end_token"
        raise InvalidRequest(f"{missing}: this model has none of its own, so the request has to name it", param=missing)
    return msgspec.structs.replace(output_format, reasoning=ReasoningFormat("request", start, end))


def thinking_for(service: Service, chosen: ThinkingPlan, prompt: str, *, has_grammar: bool) -> Thinking | None:
    """What the worker has to know of the reasoning in this prompt's output; None: nothing."""
    marks = markers(chosen.output_format)
    if marks is None or (not has_grammar and chosen.budget is None):
        return None
    is_open = marks.is_open(prompt)
    if not is_open and (chosen.is_off or marks.is_closed(prompt)):
        return None
    start = "" if is_open else marks.start
    return Thinking(
        start=start,
        end=marks.end,
        start_token_ids=_ids(service, start),
        end_token_ids=_ids(service, marks.end),
        budget=chosen.budget,
    )


def _ids(service: Service, text: str) -> list[int]:
    return tokenizer.encode(service.text.tokenizer, text, add_special_tokens=False) if text else []
