"""The same calls as each format writes them, for tests."""

from __future__ import annotations

from frontend import output_parser, reasoning, tools
from frontend.output_events import Call, Event, Reasoning, Text, settle
from frontend.output_parser import OutputFormat, OutputParser

SCHEMAS = {
    "read": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "limit": {"type": "integer"},
            "whole": {"type": "boolean"},
            "lines": {"type": "array", "items": {"type": "integer"}},
        },
    },
    "stop": {"type": "object", "properties": {}},
}
READ = {"path": "a <b>\n{c}.py", "limit": 5, "whole": True, "lines": [1, 2]}
_JSON = '{"path": "a <b>\\n{c}.py", "limit": 5, "whole": true, "lines": [1, 2]}'

# text "Hi", then read(READ), then stop()
OUTPUTS: dict[str, str] = {
    "hermes": 'Hi\n<tool_call>\n{"name": "read", "arguments": $ARGS}\n</tool_call>\n'
    '<tool_call>\n{"arguments": {}, "name": "stop"}\n</tool_call>',
    "qwen3_coder": "Hi\n<tool_call>\n<function=read>\n<parameter=path>\na <b>\n{c}.py\n</parameter>\n"
    "<parameter=limit>\n5\n</parameter>\n<parameter=whole>\nTrue\n</parameter>\n<parameter=lines>\n[1, 2]\n</parameter>\n"
    "</function>\n"
    "</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>",
    "llama3": 'Hi<|python_tag|>{"name": "read", "parameters": $ARGS}; {"name": "stop", "parameters": {}}',
    "mistral": 'Hi[TOOL_CALLS]read[ARGS]$ARGS[TOOL_CALLS][{"name": "stop", "arguments": {}, "id": "abcdefghi"}]',
    "gemma4": 'Hi<|tool_call>call:read{lines:[1,2],limit:5,path:<|"|>a <b>\n{c}.py<|"|>,whole:true}<tool_call|>'
    "<|tool_call>call:stop{}<tool_call|>",
    "glm4": "Hi<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>a <b>\n{c}.py</arg_value>\n"
    "<arg_key>limit</arg_key>"
    "<arg_value>5</arg_value><arg_key>whole</arg_key><arg_value>true</arg_value><arg_key>lines</arg_key>"
    "<arg_value>[1, 2]</arg_value></tool_call><tool_call>stop</tool_call>",
    "deepseek": "Hi<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>read\n```json\n$ARGS\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "Hi<|tool_calls_section_begin|><|tool_call_begin|>functions.read:0<|tool_call_argument_begin|>$ARGS"
    "<|tool_call_end|><|tool_call_begin|>functions.stop:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "minimax": 'Hi\n<minimax:tool_call>\n<invoke name="read">\n<parameter name="path">a <b>\n{c}.py</parameter>\n'
    '<parameter name="limit">5</parameter>\n<parameter name="whole">true</parameter>\n'
    '<parameter name="lines">[1, 2]</parameter>\n</invoke>\n<invoke name="stop">\n</invoke>\n</minimax:tool_call>',
    "lfm2": 'Hi<|tool_call_start|>[read(path="a <b>\\n{c}.py", limit=5, whole=True, lines=[1, 2]), stop()]'
    "<|tool_call_end|>",
    "harmony": "<|channel|>commentary<|message|>Hi<|end|><|start|>assistant<|channel|>commentary to=functions.read "
    "<|constrain|>json<|message|>$ARGS<|call|><|start|>assistant to=functions.stop<|channel|>commentary<|message|>{}",
}
OUTPUTS = {name: text.replace("$ARGS", _JSON) for name, text in OUTPUTS.items()}
OUTPUTS["longcat"] = OUTPUTS["glm4"].replace("tool_call>", "longcat_tool_call>").replace("arg_", "longcat_arg_")

THINK = reasoning.ReasoningFormat("think", "<think>", "</think>")


def output_format(name: str, marks: reasoning.ReasoningFormat | None = None) -> OutputFormat:
    return OutputFormat(tools=tools.get(name), reasoning=marks, is_harmony=name == "harmony")


class Parsed:
    """An output parsed from `pieces`."""

    def __init__(
        self,
        name: str,
        pieces: list[str],
        *,
        marks: reasoning.ReasoningFormat | None = None,
        prompt: str = "",
        with_tools: bool = True,
        max_calls: int | None = None,
    ) -> None:
        self.num_failed = 0
        request = output_parser.Request(
            output_format=output_format(name, marks),
            prompt=prompt,
            tools=SCHEMAS if with_tools else None,
            max_calls=max_calls,
            on_failed_call=self._count,
        )
        parser = OutputParser(request)
        self.events: list[Event] = []
        for piece in pieces:
            self.events += parser.feed(piece)
        self.events += parser.close()

    def _count(self) -> None:
        self.num_failed += 1

    @property
    def blocks(self) -> list[tuple[str, ...]]:
        """Without the ids, which are drawn."""
        return [_plain(block) for block in settle(self.events)]


def _plain(block: Text | Reasoning | Call) -> tuple[str, ...]:
    if isinstance(block, Call):
        return ("call", block.name, block.arguments)
    return ("text" if isinstance(block, Text) else "reasoning", block.text)
