"""Request bodies of Anthropic's Messages API. As in schemas.py, an unlisted field gives a 400 that names it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from frontend.schemas import MAX_STOPS, MAX_TOOLS, Body, Positive


class CacheControl(Body, frozen=True, kw_only=True):
    """Taken and ignored: every prefix is cached, for as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: str | None = None


class Block(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    cache_control: CacheControl | None = None


class TextBlock(Block, frozen=True, kw_only=True, tag="text"):
    text: str
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ImageBlock(Block, frozen=True, kw_only=True, tag="image"):
    source: dict[str, Any]


class DocumentSource(Body, frozen=True, kw_only=True):
    type: Literal["text", "content"]
    media_type: Literal["text/plain"] | None = None
    data: str | None = None  # of type text
    content: str | list[TextBlock] | None = None  # of type content


class DocumentBlock(Block, frozen=True, kw_only=True, tag="document"):
    source: DocumentSource
    title: str | None = None
    context: str | None = None


class ThinkingBlock(Block, frozen=True, kw_only=True, tag="thinking"):
    thinking: str
    signature: str = ""  # not checked: the text is what the template gets


class ToolUseBlock(Block, frozen=True, kw_only=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Block, frozen=True, kw_only=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None


AnyBlock = TextBlock | ImageBlock | DocumentBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(Body, frozen=True, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[AnyBlock]


class MessagesTool(Body, frozen=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[\w.:-]{1,128}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # inputs always stream as they come


class MessagesToolChoice(Body, frozen=True, kw_only=True):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None  # with type "tool"
    disable_parallel_tool_use: bool = False


class Thinking(Body, frozen=True, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None
    display: Literal["summarized", "omitted"] | None = None


class Metadata(Body, frozen=True, kw_only=True):
    user_id: str | None = None


class Edit(Body, frozen=True, kw_only=True):
    """Claude Code asks to keep all thinking, which is what happens."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Body, frozen=True, kw_only=True):
    edits: list[Edit] = field(default_factory=list)


class JsonOutput(Body, frozen=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Body, frozen=True, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None  # see frontend.thinking
    format: JsonOutput | None = None


class Prompt(Body, frozen=True, kw_only=True):
    """What both routes share: all that makes the prompt."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    model: str
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None  # the older place of output_config.format


class CountTokensBody(Prompt, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens."""


class MessagesBody(Prompt, frozen=True, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Positive
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None  # there is one tier
