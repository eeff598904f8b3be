"""Request bodies. Every field is listed: one that is not gives a 400 that names it, and so does one of a wrong type.

A null counts as absent. Values that need to know the model (token ids, lengths) are checked where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import fields
from starlette.datastructures import QueryParams

from frontend.json_depth import check_depth
from shared.errors import InvalidRequest

MAX_STOPS = 16
MAX_TOOLS = 512

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Positive = Annotated[int, Meta(ge=1)]


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class StreamOptions(Body, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # random padding against traffic analysis: not offered


class JsonSchemaFormat(Body, frozen=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[\w-]{1,64}$")]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None  # the schema is enforced either way


class ResponseFormat(Body, frozen=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body, frozen=True, kw_only=True):
    """Exactly one of them, in vLLM's names. `grammar` is Lark or EBNF."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationBody(Body, frozen=True, kw_only=True):
    """What chat and plain completions share."""

    model: str = "default"
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    n: Annotated[int, Meta(ge=1, le=8)] = 1
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0  # smaller runs first
    user: str | None = None
    metadata: dict[str, str] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_origins: bool = False  # which tokens were drafted, and by what: docs/speculation.md


class FunctionCall(Body, frozen=True, kw_only=True):
    name: str
    arguments: str


class ToolCall(Body, frozen=True, kw_only=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Function(Body, frozen=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[\w.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body, frozen=True, kw_only=True):
    function: Function
    type: Literal["function"]


class NamedFunction(Body, frozen=True, kw_only=True):
    name: str


class NamedTool(Body, frozen=True, kw_only=True, tag_field="type", tag="function"):
    function: NamedFunction


class AllowedFunction(Body, frozen=True, kw_only=True):
    function: NamedFunction
    type: Literal["function"]


class Allowed(Body, frozen=True, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedFunction], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Body, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    """Some of the request's tools: the model hears of these only and can call no other."""

    allowed_tools: Allowed


class ChatMessage(Body, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None  # assistant
    tool_call_id: str | None = None  # tool
    reasoning_content: str | None = None  # assistant
    refusal: str | None = None  # assistant; what the API itself returned
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None  # goes to the chat template
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_budget: Annotated[int, Meta(ge=0)] | None = None  # tokens of reasoning before it is closed
    thinking_start_token: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    thinking_end_token: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool = True  # False: the output ends after its first call
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Literal[False] = False
    best_of: Positive | None = None


class TokenizeBody(Body, frozen=True, kw_only=True):
    """POST /tokenize: `prompt` or `messages`."""

    model: str = "default"
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # default: for a prompt yes, for messages no (the template writes them)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[int], Meta(max_length=4_000_000)]
    model: str = "default"


SomeBody = TypeVar("SomeBody", bound=Body)

# Fields of OpenAI's API that are known but do nothing here get a reason of their own.
_UNSUPPORTED = {
    "suffix": "inserting before a suffix is not supported",
    "functions": "it is deprecated; use tools",
    "function_call": "it is deprecated; use tool_choice",
    "audio": "audio output is not supported",
    "prediction": "predicted outputs are not supported",
    "thread": "conversations are not kept on the server; send all messages",
    "web_search_options": "there is no web search here",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
}
_LITERALS = {
    "echo": "echo is not supported",
    "store": "responses are not stored",
    "response_format.type": "only 'text', 'json_object' and 'json_schema' are supported",
    "tool_choice": "expected 'none', 'auto', 'required' or {'type': 'function' or 'allowed_tools', ...}",
}
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_NAMED = re.compile(r"(?:unknown|required) field `(.+)`")


def parse(
    raw: bytes, kind: type[SomeBody], prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content
) -> SomeBody:
    """The request in a body. `prepare` may bring its JSON into the form that `kind` has.

    Raises:
        InvalidRequest: not JSON, or a field is unknown, missing, of a wrong type or out of range; `param` names it.
    """
    try:
        content = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest("the body must be a JSON object")
    check_depth(raw, content)
    try:
        return msgspec.convert(prepare(_without_nulls(content)), kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error


def from_content(content: dict[str, Any], kind: type[SomeBody]) -> SomeBody:
    """The request in a dict that this process made. Raises InvalidRequest as `parse` does."""
    try:
        return msgspec.convert(_without_nulls(content), kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error


def parse_query(params: QueryParams, kind: type[SomeBody]) -> SomeBody:
    """The request in a query string; lists are written `name=a&name=b` or, as OpenAI's clients do, `name[]=a`.

    Raises:
        InvalidRequest: a parameter is unknown or has a wrong value; `param` names it.
    """
    content: dict[str, Any] = {}
    for name in dict.fromkeys(key.removesuffix("[]") for key in params):
        values = [*params.getlist(name), *params.getlist(f"{name}[]")]
        is_list = any(field.name == name and str(field.type).startswith("list") for field in fields(kind))
        content[name] = values if is_list else values[-1]
    try:
        return msgspec.convert(content, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls from the body and from the structs in it; free-form values (schemas, kwargs) are left alone."""
    kept = {key: value for key, value in content.items() if value is not None}
    for key in ("stream_options", "response_format", "json_schema", "structured_outputs", "thinking", "metadata"):
        if isinstance(kept.get(key), dict):
            kept[key] = _without_nulls(kept[key])
    if isinstance(kept.get("tool_choice"), dict):
        kept["tool_choice"] = _without_nulls(kept["tool_choice"])
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_without_nulls(m) if isinstance(m, dict) else m for m in kept["messages"]]
    return kept


def _explain(text: str) -> InvalidRequest:
    path = _PATH.search(text)
    place = path.group(1) if path else ""
    reason = text[: path.start()] if path else text
    if place.endswith(".type"):
        block = re.match(r"Invalid value '(.+)'", reason)
        reason = f"type {block.group(1)!r} is not supported here" if block else reason
    named = _NAMED.search(reason)
    if named:
        place = f"{place}.{named.group(1)}" if place else named.group(1)
    place = place.replace("[...]", "")
    if named and "unknown" in reason:
        reason = _UNSUPPORTED.get(named.group(1), "unknown or unsupported field")
    elif named:
        reason = "required field is missing"
    elif place in _LITERALS:
        reason = _LITERALS[place]
    else:
        reason = reason[:1].lower() + reason[1:]
    return InvalidRequest(f"{place}: {reason}" if place else reason, param=place or None)


def openapi_body(kind: type[Body]) -> dict[str, Any]:
    """What a route says of its body in /openapi.json; `openapi_components` defines what it refers to."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def openapi_query(kind: type[Body]) -> dict[str, Any]:
    """What a route says of its query in /openapi.json."""
    _, components = msgspec.json.schema_components([kind])
    properties = components[kind.__name__]["properties"]
    return {
        "parameters": [
            {"in": "query", "name": name, "required": False, "schema": schema} for name, schema in properties.items()
        ]
    }


def openapi_components(bodies: Iterable[type[Body]]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    return components
