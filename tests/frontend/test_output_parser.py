"""Tool calls and reasoning in text that is cut anywhere."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import reasoning, tools
from frontend.output_events import CallArguments, CallStart, Text
from shared.errors import BadConfig
from tests.frontend.conftest import TOKENIZER
from tests.frontend.tool_outputs import OUTPUTS, READ, THINK, Parsed

MALFORMED: dict[str, list[str]] = {
    "hermes": [
        '<tool_call>{"name": "read", "arguments": {"path" 1}}</tool_call>',
        '<tool_call>{"name": "read", "arguments": {"path": "x"',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "read", "arguments": {}} and more</tool_call>',
        '<tool_call>{"name": "read", "arguments": {"a": 01}}</tool_call>',
        "<tool_call>",
        '<tool_call>{"name": "stop"}</tool_call>then<tool_call>{"name": nil}</tool_call>',
    ],
    "qwen3_coder": ["<tool_call>\n<function=read>\n<parameter=path>\nx", "<tool_call>no</tool_call>"],
    "llama3": ['<|python_tag|>print("x")', '{"name": "read", "parameters": {"path": }}'],
    "mistral": ["[TOOL_CALLS]read[ARGS]{", '[TOOL_CALLS][{"name": 1}]', "[TOOL_CALLS]!"],
    "gemma4": ['<|tool_call>call:read{path:<|"|>x', "<|tool_call>call:read{path:}<tool_call|>"],
    "glm4": ["<tool_call>read", "<tool_call>read<arg_key>a</arg_key>x</tool_call>"],
    "deepseek": ["<｜tool▁call▁begin｜>read<｜tool▁sep｜>[]<｜tool▁call▁end｜>"],
    "kimi_k2": ["<|tool_call_begin|>functions.read:0<|tool_call_argument_begin|>{'a': 1}<|tool_call_end|>"],
    "minimax": ['<invoke name="read">\n<parameter name="path">x</param></invoke>'],
    "lfm2": ["<|tool_call_start|>[read(path=open('x'))]<|tool_call_end|>", "<|tool_call_start|>[read(1)]"],
    "harmony": ["<|channel|>commentary to=functions.read<|message|>{oops}<|call|>"],
}
CASES = [(name, text) for name, texts in MALFORMED.items() for text in [OUTPUTS[name], *texts]]
CASES.append(("longcat", OUTPUTS["longcat"]))


@pytest.mark.parametrize("name", OUTPUTS)
def test_text_and_both_calls_are_found(name: str) -> None:
    parsed = Parsed(name, [OUTPUTS[name]])
    text, first, second = parsed.blocks
    assert text == ("text", "Hi")
    assert (first[1], json.loads(first[2])) == ("read", READ)
    assert second == ("call", "stop", "{}")
    assert parsed.num_failed == 0


@pytest.mark.parametrize(("name", "text"), CASES)
def test_every_border_gives_the_same_parse(name: str, text: str) -> None:
    text += " after"
    whole = Parsed(name, [text])
    singly = Parsed(name, list(text))
    assert singly.blocks == whole.blocks
    assert singly.num_failed == whole.num_failed
    for i in range(1, len(text)):
        cut = Parsed(name, [text[:i], text[i:]])
        assert cut.blocks == whole.blocks, text[:i]
        assert cut.num_failed == whole.num_failed


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(OUTPUTS)))
def test_any_mixture_of_fragments_is_parsed_alike_in_any_pieces(data: st.DataObject, name: str) -> None:
    source = OUTPUTS[name]
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(source)), st.integers(0, 40)), max_size=5))
    text = "".join(source[start : start + length] for start, length in cuts) + data.draw(
        st.text("<|>{}\"',: x", max_size=8)
    )
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
    assert Parsed(name, pieces).blocks == Parsed(name, [text]).blocks


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_a_malformed_call_comes_out_as_text_and_is_counted(name: str, text: str) -> None:
    parsed = Parsed(name, ["Hi ", text])
    if name == "harmony" or text.startswith("{"):  # these begin an output
        parsed = Parsed(name, [text])
    assert parsed.num_failed == 1
    shown = "".join(block[1] for block in parsed.blocks if block[0] == "text")
    if name == "harmony":
        assert shown == text.removesuffix("<|call|>")
    elif '"stop"' in text:
        assert [block[0] for block in parsed.blocks] == ["text", "call", "text"]
        assert shown == 'Hithen<tool_call>{"name": nil}</tool_call>'
    else:
        assert text in shown
        assert [block[0] for block in parsed.blocks] == ["text"]


def test_arguments_stream_as_they_come_and_text_is_not_held_back() -> None:
    pieces = [
        "Hello ",
        "wor",
        "ld <",
        'tool_call>{"name": "read", "argu',
        'ments": {"path": "ab',
        "cd",
        'ef"}}</tool_call>',
    ]
    events = Parsed("hermes", pieces).events
    assert [e.text for e in events if isinstance(e, Text)] == ["Hello", " wor", "ld"]
    assert [e.json for e in events if isinstance(e, CallArguments)] == ['{"path": "ab', "cd", 'ef"}']
    assert [e.name for e in events if isinstance(e, CallStart)] == ["read"]


def test_each_value_of_an_xml_call_streams_when_complete() -> None:
    pieces = OUTPUTS["qwen3_coder"].split("</parameter>")
    events = Parsed("qwen3_coder", [piece + "</parameter>" for piece in pieces[:-1]] + pieces[-1:]).events
    assert [e.json for e in events if isinstance(e, CallArguments)][:2] == ['{"path": "a <b>\\n{c}.py"', ', "limit": 5']


def test_control_characters_in_strings_are_escaped() -> None:
    parsed = Parsed("hermes", ['<tool_call>{"name": "read", "arguments": {"path": "a\nb\tc"}}</tool_call>'])
    assert json.loads(parsed.blocks[0][2]) == {"path": "a\nb\tc"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "stop", "arguments": %s}</tool_call>' % ('{"a": ' * 70)),
        ("lfm2", "<|tool_call_start|>[read(limit=inf)]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[read(limit={1, 2})]<|tool_call_end|>"),
        ("lfm2", '<|tool_call_start|>[read(path="""a " %s " b""")]<|tool_call_end|>' % ("1" * 5000)),
        ("lfm2", "<|tool_call_start|>[read(limit=%s)]<|tool_call_end|>" % ("(" * 500)),
    ],
)
def test_values_that_cannot_be_read_fail_like_any_other(name: str, text: str) -> None:
    parsed = Parsed(name, [text])
    assert parsed.blocks == [("text", text)]
    assert parsed.num_failed == 1


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 5000])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_number_beyond_what_python_reads_is_passed_on_and_takes_no_call_away(name: str, number: str) -> None:
    text = re.sub(r"(?<!\w)5(?!\w)", number, OUTPUTS[name], count=1)
    text = re.sub(r"\[1, ?2\]", f"[{number}, 2]", text)
    parsed = Parsed(name, [text])
    assert parsed.num_failed == 0
    assert [block[:2] for block in parsed.blocks] == [("text", "Hi"), ("call", "read"), ("call", "stop")]
    arguments = json.loads(parsed.blocks[1][2], parse_int=str, parse_float=str)
    assert arguments == {**READ, "limit": number, "lines": [number, "2"]}


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("glm4", "<tool_call>read<arg_key>a</arg_key><arg_value>{'b': (1e999, True)}</arg_value></tool_call>",
         '{"a": {"b": [1e999, true]}}'),
        ("lfm2", "<|tool_call_start|>[read(a={1: +1e999, 1e999: '1e999 \\'', 'c': null})]<|tool_call_end|>",
         '{"a": {"1": 1e999, "1e999": "1e999 \'", "c": null}}'),
        ("lfm2", "<|tool_call_start|>[read(a=1_0)]<|tool_call_end|>", '{"a": 10}'),
        ("hermes", '<tool_call>{"id": %s, "name": "read"}</tool_call>' % ("9" * 5000), "{}"),
        ("hermes", '<tool_call>{"name": "read", "arguments": "{\\"a\\": 1e999}"}</tool_call>', '{"a": 1e999}'),
    ],
)  # fmt: skip
def test_such_numbers_may_stand_anywhere(name: str, text: str, arguments: str) -> None:
    parsed = Parsed(name, [text])
    assert parsed.blocks == [("call", "read", arguments)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "a\\ud800", "arguments": {"path": "\\ud800"}}</tool_call>'),
        ("glm4", '<tool_call>read<arg_key>lines</arg_key><arg_value>["\\ud800"]</arg_value></tool_call>'),
    ],
)
def test_half_a_surrogate_pair_can_still_be_sent(name: str, text: str) -> None:
    _, _, arguments = Parsed(name, [text]).blocks[0]
    assert "\\ud800" in arguments.encode().decode()


def test_llama_answers_in_json_stay_text() -> None:
    parsed = Parsed("llama3", ['{"answer": ', "42}"])
    assert parsed.blocks == [("text", '{"answer": 42}')]
    assert parsed.num_failed == 0
    assert Parsed("llama3", ['{"name": "nobody", "parameters": {}}']).num_failed == 0
    assert Parsed("llama3", ['{"name": "stop", "parameters": {}}']).blocks == [("call", "stop", "{}")]


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "harmony"])
def test_without_tools_calls_are_text(name: str) -> None:
    assert Parsed(name, [OUTPUTS[name]], with_tools=False).blocks == [("text", OUTPUTS[name])]


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_call_ends_the_output_where_only_one_is_wanted(name: str) -> None:
    assert [b[0] for b in Parsed(name, [OUTPUTS[name]], max_calls=1).blocks] == ["text", "call"]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("", "<think>\nhm\n</think>\n\nYes", [("reasoning", "hm"), ("text", "Yes")]),
        ("", "\n<think>hm</think>Yes\n", [("reasoning", "hm"), ("text", "Yes\n")]),
        ("...<think>\n", "hm </think> Yes", [("reasoning", "hm"), ("text", "Yes")]),
        ("...<think>\n\n</think>\n\n", "Yes", [("text", "Yes")]),
        ("", "<think></think>Yes", [("text", "Yes")]),
        ("", "<think>cut o", [("reasoning", "cut o")]),
        ("", "The tag <think> is </think>.", [("text", "The tag <think> is </think>.")]),
        ("", "  <thin", [("text", "  <thin")]),
        (
            "<think>",
            'a <tool_call>{"name": "stop"}</tool_call> b</think><tool_call>{"name": "stop"}</tool_call>',
            [("reasoning", 'a <tool_call>{"name": "stop"}</tool_call> b'), ("call", "stop", "{}")],
        ),
    ],
)
def test_reasoning_is_split_off_at_every_border(prompt: str, text: str, expected: list[tuple[str, ...]]) -> None:
    for i in range(len(text) + 1):
        assert Parsed("hermes", [text[:i], text[i:]], marks=THINK, prompt=prompt).blocks == expected


def test_harmony_splits_channels() -> None:
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>"
    for i in range(len(text) + 1):
        assert Parsed("harmony", [text[:i], text[i:]]).blocks == [("reasoning", "hm"), ("text", "Yes")]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tool_call.name }}<tool_call>", "hermes"),
        ("<tool_call>\n<function=x>\n<parameter=y>", "qwen3_coder"),
        ("<|python_tag|>", "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|tool_call>call<tool_call|>", "gemma4"),
        ("<tool_call>x<arg_key>", "glm4"),
        ("<｜tool▁calls▁begin｜>", "deepseek"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("<minimax:tool_call>", "minimax"),
        ("<|tool_list_start|>", "lfm2"),
        ("<|start|>x<|channel|>y<|message|>", "harmony"),
        ("<longcat_tool_call>", "longcat"),
        ("<|im_start|>", None),
    ],
)
def test_templates_tell_the_format(template: str, name: str | None) -> None:
    assert tools.choose("", template) == name
    assert tools.choose("none", template) is None
    assert tools.choose("mistral", template) == "mistral"


def test_misspelt_parsers_stop_start_up() -> None:
    with pytest.raises(BadConfig, match=r"TANDEM_TOOL_PARSER.*hermes"):
        tools.choose("herms", "")
    with pytest.raises(BadConfig, match=r"TANDEM_REASONING_PARSER.*think"):
        reasoning.choose("thinking", "", TOKENIZER)


GEMMA_CALL = '<|tool_call>call:read{path:<|"|>a<|"|>}<tool_call|>'


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("", "<|channel>thought\nhm\n<channel|>Yes", [("reasoning", "hm"), ("text", "Yes")]),
        ("", "<|channel>thought\n<channel|>Yes", [("text", "Yes")]),  # what models write that do not think
        ("...<|channel>thought\n", "hm<channel|>Yes", [("reasoning", "hm"), ("text", "Yes")]),
        ("...<|channel>thought\n<channel|>", "Yes", [("text", "Yes")]),
        ("", "<|channel>thought\nhm", [("reasoning", "hm")]),
        ("", "Yes <|channel>", [("text", "Yes <|channel>")]),
        ("", f"<|channel>thought\nhm<channel|>{GEMMA_CALL}", [("reasoning", "hm"), ("call", "read", '{"path": "a"}')]),
    ],
)
def test_gemma4_thinking_is_split_off_at_every_border(prompt: str, text: str, expected: list[tuple[str, ...]]) -> None:
    marks = reasoning.choose("gemma4", "", TOKENIZER)
    for i in range(len(text) + 1):
        assert Parsed("gemma4", [text[:i], text[i:]], marks=marks, prompt=prompt).blocks == expected


def test_gemma4_thinking_is_found_in_its_template() -> None:
    chosen = reasoning.choose("", "{{ '<|channel>thought\n<channel|>' }}", TOKENIZER)
    assert chosen is not None
    assert chosen.name == "gemma4"
