"""Tool call formats, one file each, and how a model's is found."""

from __future__ import annotations

from frontend.tools import deepseek, gemma4, glm4, harmony, hermes, kimi_k2, lfm2, llama3, minimax, mistral, qwen3_coder
from frontend.tools.format import ToolFormat
from shared.errors import BadConfig

_FORMATS: dict[str, ToolFormat] = {
    f.name: f
    for f in (
        hermes.FORMAT,
        qwen3_coder.FORMAT,
        llama3.FORMAT,
        mistral.FORMAT,
        gemma4.FORMAT,
        glm4.FORMAT,
        glm4.LONGCAT,
        deepseek.FORMAT,
        kimi_k2.FORMAT,
        minimax.FORMAT,
        lfm2.FORMAT,
    )
}
NAMES = (*_FORMATS, harmony.NAME)

# The first whose texts are all in the chat template; the more particular ones come first.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (harmony.NAME, ("<|channel|>", "<|message|>")),
    ("minimax", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm4", ("<arg_key>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek", ("<｜tool▁calls▁begin｜>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("hermes", ("<tool_call>",)),
    ("llama3", ("<|python_tag|>",)),
    ("llama3", ("<|start_header_id|>", '"parameters": ')),
)


def choose(name: str, template: str) -> str | None:
    """The name of the format: `name` if given, else by the chat template's markers; None where there is none.

    Raises:
        BadConfig: no such format.
    """
    if name == "none":
        return None
    if name:
        if name not in NAMES:
            raise BadConfig(f"TANDEM_TOOL_PARSER: {name!r} is none of {', '.join((*NAMES, 'none'))}")
        return name
    return next((found for found, marks in _MARKS if all(mark in template for mark in marks)), None)


def get(name: str) -> ToolFormat | None:
    """None for harmony, which is no format within text but one of the whole output."""
    return _FORMATS.get(name)
