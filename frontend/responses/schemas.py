"""Request bodies of the Responses API. As in frontend/schemas.py, an unlisted field gives a 400 that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from frontend.responses.items import AnyItem, LocalEnvironment, with_type
from frontend.schemas import MAX_TOOLS, Body, Positive

ToolName = Annotated[str, Meta(pattern=r"^[\w.:-]{1,128}$")]
Include = Literal["reasoning.encrypted_content", "message.output_text.logprobs"]
Callers = Annotated[list[Literal["direct"]], Meta(max_length=1)] | None


class ToolBase(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", omit_defaults=True):
    pass


class FunctionTool(ToolBase, frozen=True, kw_only=True, tag="function"):
    name: ToolName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: Callers = None


class TextFormat(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class GrammarFormat(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="grammar"):
    """The model is told of the grammar, and its input is held to it."""

    definition: str
    syntax: Literal["lark", "regex"]


class CustomTool(ToolBase, frozen=True, kw_only=True, tag="custom"):
    name: ToolName
    description: str | None = None
    format: TextFormat | GrammarFormat | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: Callers = None


class LocalShellTool(ToolBase, frozen=True, kw_only=True, tag="local_shell"):
    pass


class ShellTool(ToolBase, frozen=True, kw_only=True, tag="shell"):
    environment: LocalEnvironment | None = None
    allowed_callers: Callers = None


class ApplyPatchTool(ToolBase, frozen=True, kw_only=True, tag="apply_patch"):
    allowed_callers: Callers = None


class NamespaceTool(ToolBase, frozen=True, kw_only=True, tag="namespace"):
    name: ToolName
    description: str
    tools: Annotated[list[FunctionTool | CustomTool], Meta(max_length=MAX_TOOLS)]


class WebSearchTool(ToolBase, frozen=True, kw_only=True, tag="web_search", forbid_unknown_fields=False):
    """Codex declares it with every request unless told not to. It is left out: the model hears nothing of it."""


AnyTool = FunctionTool | CustomTool | LocalShellTool | ShellTool | ApplyPatchTool | NamespaceTool | WebSearchTool


class ToolChoice(Body, frozen=True, kw_only=True, omit_defaults=True):
    """A tool by its name or type, or, with `allowed_tools`, those that may be called."""

    type: Literal["function", "custom", "allowed_tools", "local_shell", "shell", "apply_patch"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class JsonSchemaFormat(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema",
    rename={"schema_": "schema"}, omit_defaults=True,
):  # fmt: skip
    name: str
    schema_: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonObjectFormat(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"
):
    pass


class TextConfig(Body, frozen=True, kw_only=True):
    format: TextFormat | JsonSchemaFormat | JsonObjectFormat | None = None
    verbosity: Literal["medium"] | None = None  # the default; nothing here makes answers longer or shorter


class ReasoningConfig(Body, frozen=True, kw_only=True, omit_defaults=True):
    """`effort` goes to the chat template; `summary` says where the reasoning is shown."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # the former name
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None


class ResponsesStreamOptions(Body, frozen=True, kw_only=True):
    include_obfuscation: Literal[False] = False  # random padding against traffic analysis: not offered


class PromptCacheOptions(Body, frozen=True, kw_only=True):
    """Taken and ignored: every prefix is cached, for as long as there is room."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None


MetadataKey = Annotated[str, Meta(max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]


class ContextBody(Body, frozen=True, kw_only=True):
    """What all routes share: all that makes the prompt."""

    model: str = "default"
    input: str | list[AnyItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[AnyTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] = "disabled"


class ResponsesBody(ContextBody, frozen=True, kw_only=True):
    """POST /v1/responses."""

    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    store: bool = True
    background: bool = False
    max_output_tokens: Positive | None = None
    max_tool_calls: Positive | None = None  # counts calls of tools that the server runs, of which there are none
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[Include] = field(default_factory=list)
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None  # there is one tier
    # Names of end users and caches: kept with the response, otherwise without effect.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    client_metadata: dict[str, str] | None = None  # Codex


class CompactBody(ContextBody, frozen=True, kw_only=True):
    """POST /v1/responses/compact. Codex sends the tools and the reasoning of its conversation along."""

    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    client_metadata: dict[str, str] | None = None


class InputTokensBody(ContextBody, frozen=True, kw_only=True):
    """POST /v1/responses/input_tokens."""


class RetrieveQuery(Body, frozen=True, kw_only=True):
    """GET /v1/responses/{id}."""

    stream: bool = False
    starting_after: Annotated[int, Meta(ge=0)] | None = None
    include: list[Include] = field(default_factory=list)
    include_obfuscation: Literal[False] = False


class InputItemsQuery(Body, frozen=True, kw_only=True):
    """GET /v1/responses/{id}/input_items."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    include: list[Include] = field(default_factory=list)


def prepare(content: dict[str, Any]) -> dict[str, Any]:
    """A body before it is parsed: nulls dropped where they mean nothing, items given the type they may leave out."""
    kept = dict(content)
    if isinstance(kept.get("input"), list):
        kept["input"] = [with_type(item) for item in kept["input"]]
    for key in ("text", "reasoning", "prompt_cache_options"):
        if isinstance(kept.get(key), dict):
            kept[key] = {name: value for name, value in kept[key].items() if value is not None}
    if isinstance(kept.get("tools"), list):
        kept["tools"] = [
            {name: value for name, value in tool.items() if value is not None} if isinstance(tool, dict) else tool
            for tool in kept["tools"]
        ]
    return kept
