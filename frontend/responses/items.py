"""The items that a conversation is made of, as clients send them and as they are stored.

What this server puts out is among them, so that an output can be sent back as it came. Fields that say nothing to a
model (`status`, `phase`) are taken and kept.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from frontend.schemas import Body

ItemStatus = Literal["in_progress", "completed", "incomplete"]
CallId = Annotated[str, Meta(min_length=1, max_length=256)]


class Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", omit_defaults=True):
    pass


class CacheBreakpoint(Body, frozen=True, kw_only=True):
    """Taken and ignored: every prefix is cached."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class InputText(Part, frozen=True, kw_only=True, tag="input_text"):
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class OutputText(Part, frozen=True, kw_only=True, tag="output_text"):
    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class Refusal(Part, frozen=True, kw_only=True, tag="refusal"):
    refusal: str


class InputImage(Part, frozen=True, kw_only=True, tag="input_image"):
    detail: Literal["low", "high", "auto", "original"] = "auto"
    file_id: str | None = None
    image_url: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class InputFile(Part, frozen=True, kw_only=True, tag="input_file"):
    detail: Literal["auto", "low", "high"] | None = None
    file_data: str | None = None
    file_id: str | None = None
    file_url: str | None = None
    filename: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


AnyPart = InputText | OutputText | Refusal | InputImage | InputFile
ResultPart = InputText | InputImage | InputFile


class Item(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", omit_defaults=True):
    id: str | None = None
    status: ItemStatus | None = None


class Message(Item, frozen=True, kw_only=True, tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[AnyPart]
    phase: Literal["commentary", "final_answer"] | None = None


class SummaryText(Part, frozen=True, kw_only=True, tag="summary_text"):
    text: str


class ReasoningText(Part, frozen=True, kw_only=True, tag="reasoning_text"):
    text: str


class PlainReasoningText(Part, frozen=True, kw_only=True, tag="text"):
    text: str


class Reasoning(Item, frozen=True, kw_only=True, tag="reasoning"):
    """Its text is in `encrypted_content`, else in `content`, else in `summary`."""

    summary: list[SummaryText] = field(default_factory=list)
    content: list[ReasoningText | PlainReasoningText] | None = None
    encrypted_content: str | None = None


class FunctionCall(Item, frozen=True, kw_only=True, tag="function_call"):
    call_id: CallId
    name: str
    arguments: str
    namespace: str | None = None


class FunctionCallOutput(Item, frozen=True, kw_only=True, tag="function_call_output"):
    call_id: CallId
    output: str | list[ResultPart]
    name: str | None = None
    namespace: str | None = None


class CustomToolCall(Item, frozen=True, kw_only=True, tag="custom_tool_call"):
    call_id: CallId
    name: str
    input: str
    namespace: str | None = None


class CustomToolCallOutput(Item, frozen=True, kw_only=True, tag="custom_tool_call_output"):
    call_id: CallId
    output: str | list[ResultPart]
    name: str | None = None


class LocalShellAction(Body, frozen=True, kw_only=True, omit_defaults=True):
    command: list[str]
    type: Literal["exec"] = "exec"
    env: dict[str, str] = field(default_factory=dict)
    timeout_ms: int | None = None
    user: str | None = None
    working_directory: str | None = None


class LocalShellCall(Item, frozen=True, kw_only=True, tag="local_shell_call"):
    call_id: CallId
    action: LocalShellAction


class LocalShellCallOutput(Item, frozen=True, kw_only=True, tag="local_shell_call_output"):
    """`id` is the call's, be it the item's or its `call_id`."""

    output: str
    call_id: CallId | None = None


class ShellAction(Body, frozen=True, kw_only=True, omit_defaults=True):
    commands: list[str]
    max_output_length: int | None = None
    timeout_ms: int | None = None


class LocalEnvironment(Body, frozen=True, kw_only=True):
    type: Literal["local"]


class ShellCall(Item, frozen=True, kw_only=True, tag="shell_call"):
    call_id: CallId
    action: ShellAction
    environment: LocalEnvironment | None = None


class Outcome(Body, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["exit", "timeout"]
    exit_code: int | None = None


class ShellResult(Body, frozen=True, kw_only=True):
    stdout: str
    stderr: str
    outcome: Outcome


class ShellCallOutput(Item, frozen=True, kw_only=True, tag="shell_call_output"):
    call_id: CallId
    output: list[ShellResult]
    max_output_length: int | None = None


class PatchOperation(Body, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["create_file", "update_file", "delete_file"]
    path: str
    diff: str | None = None


class ApplyPatchCall(Item, frozen=True, kw_only=True, tag="apply_patch_call"):
    call_id: CallId
    operation: PatchOperation


class ApplyPatchCallOutput(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="apply_patch_call_output",
    omit_defaults=True,
):  # fmt: skip
    call_id: CallId
    status: Literal["completed", "failed"]
    id: str | None = None
    output: str | None = None


class Compaction(Item, frozen=True, kw_only=True, tag="compaction"):
    encrypted_content: str


class CompactionSummary(Item, frozen=True, kw_only=True, tag="compaction_summary"):
    """The same under its former name."""

    encrypted_content: str


class ItemReference(Item, frozen=True, kw_only=True, tag="item_reference"):
    """An item of a stored response, by its id."""


Call = FunctionCall | CustomToolCall | LocalShellCall | ShellCall | ApplyPatchCall
CallOutput = FunctionCallOutput | CustomToolCallOutput | LocalShellCallOutput | ShellCallOutput | ApplyPatchCallOutput
AnyItem = (
    Message
    | Reasoning
    | FunctionCall
    | FunctionCallOutput
    | CustomToolCall
    | CustomToolCallOutput
    | LocalShellCall
    | LocalShellCallOutput
    | ShellCall
    | ShellCallOutput
    | ApplyPatchCall
    | ApplyPatchCallOutput
    | Compaction
    | CompactionSummary
    | ItemReference
)

# How ids of each kind begin, for items that come without one.
ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "cto",
    "local_shell_call": "lsh",
    "local_shell_call_output": "lsho",
    "shell_call": "sh",
    "shell_call_output": "sho",
    "apply_patch_call": "apc",
    "apply_patch_call_output": "apco",
    "compaction": "cmp",
    "compaction_summary": "cmp",
}


def with_type(item: object) -> object:
    """An item of a body as it is parsed: nulls dropped, and the type that a message or a reference may leave out."""
    if not isinstance(item, dict):
        return item
    kept = {key: _without_nulls(value) for key, value in item.items() if value is not None}
    if "type" not in kept:
        if "role" in kept:
            kept["type"] = "message"
        elif "id" in kept:
            kept["type"] = "item_reference"
    return kept


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def shown(item: dict[str, Any]) -> dict[str, Any]:
    """As the API lists items: message content is always a list of parts."""
    if item["type"] == "message" and isinstance(item["content"], str):
        kind = "output_text" if item["role"] == "assistant" else "input_text"
        part = {"type": kind, "text": item["content"]}
        return item | {"content": [part | {"annotations": []} if kind == "output_text" else part]}
    return item
