"""Nested fields of the SDKs' request types act, are refused by name, or are in the docs' table of what has no effect.

As test_fields.py does for the fields of a body, this goes through the fields of the objects in it, down to the last: a
new release of an SDK that adds one fails here until somebody decides. A branch ends where the server refuses the whole
object by its `type` (or by the field that holds it).
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frontend.media.loader import MediaLoader
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.sdk_types import Json, Object, Samples
from tests.frontend.test_fields import CHAT_TOOLS, CLAUDE_TOOLS, FLAT_TOOLS, REASONED, ROUTES, TURN, observe
from tests.frontend.test_media import PROCESSOR, encoded, picture, uri

PAGE = Path(__file__).parents[2] / "docs" / "api-compatibility.md"

# What reaches a template is all in the prompt, so that a field that does not change the prompt told the model nothing.
TEMPLATE = (
    "{{ tools | tojson }}{{ reasoning_effort }}{{ enable_thinking }}{% for m in messages %}{{ m | tojson }}"
    "{% if m.content is not string %}{% for p in m.content %}{% if p.type == 'image' %}<|endoftext|>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)

PNG = [encoded(picture(16, 16, seed)) for seed in range(2)]
URIS = [uri(png) for png in PNG]
BASE64 = [base64.b64encode(png).decode() for png in PNG]
SCHEMAS = [{"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab"]
ARGUMENTS = ['{"a": 1}', '{"a": 2}']
NAMES = ["read", "stop"]
GRAMMARS = ['start: "a"', 'start: "b"']


USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "read", "input": {}}]}


def call(kind: str, **fields: Any) -> list[Json]:
    return [{"type": kind, "call_id": "x", "id": "x", **fields}]


SAMPLES = {
    "/v1/chat/completions": Samples(
        {
            ("ImageURL", "url"): URIS,
            ("Function", "name"): NAMES,
            ("Function", "arguments"): ARGUMENTS,
            ("FunctionDefinition", "name"): NAMES,
            ("FunctionDefinition", "parameters"): SCHEMAS,
            ("JSONSchema", "schema"): SCHEMAS,
            ("JSONSchema", "name"): NAMES,
            ("ChatCompletionAllowedToolsParam", "tools"): [
                [{"type": "function", "function": {"name": n}}] for n in NAMES
            ],
        },
        also={"ChatCompletionAssistantMessageParam": {"refusal"}},
    ),
    "/v1/completions": Samples({}),
    "/v1/responses": Samples(
        {
            ("ResponseInputImageParam", "image_url"): URIS,
            ("ResponseInputImageContentParam", "image_url"): URIS,
            ("FunctionCallOutput", "call_id"): ["x"],
            ("LocalShellCallOutput", "id"): ["x"],
            ("ItemReference", "id"): ["msg_a", "msg_b"],
            ("ResponseOutputRefusalParam", "refusal"): ["z", "y"],
            ("ResponseReasoningItemParam", "content"): [[{"type": "reasoning_text", "text": "z"}]],
            ("ResponseFormatTextJSONSchemaConfigParam", "name"): NAMES,
            ("ResponseFunctionToolCallParam", "arguments"): ARGUMENTS,
            ("Grammar", "definition"): GRAMMARS,
            ("ToolChoiceAllowedParam", "tools"): [[{"type": "function", "name": name}] for name in NAMES],
            ("ToolChoiceFunctionParam", "name"): NAMES,
            ("FunctionToolParam", "name"): NAMES,
            ("FunctionToolParam", "parameters"): SCHEMAS,
            ("ToolFunction", "parameters"): SCHEMAS,
            ("ResponseFormatTextJSONSchemaConfigParam", "schema"): SCHEMAS,
        },
        also={
            "ResponseInputImageParam": {"image_url"},
            "ResponseInputImageContentParam": {"image_url"},
            "FunctionCallOutput": {"call_id"},
        },
        before={
            "FunctionCallOutput": call("function_call", name="read", arguments="{}"),
            "LocalShellCallOutput": call("local_shell_call", action={"type": "exec", "command": ["ls"], "env": {}}),
            "ShellCallOutput": call("shell_call", action={"commands": ["ls"]}),
            "ApplyPatchCallOutput": call("apply_patch_call", operation={"type": "delete_file", "path": "a"}),
            "ResponseCustomToolCallOutputParam": call("custom_tool_call", name="read", input="a"),
        },
    ),
    "/v1/messages": Samples(
        {
            ("Base64ImageSourceParam", "data"): BASE64,
            ("URLImageSourceParam", "url"): URIS[::-1],
            ("DocumentBlockParam", "source"): [{"type": "text", "media_type": "text/plain", "data": t} for t in "xy"],
            ("JSONOutputFormatParam", "schema"): SCHEMAS,
            ("ThinkingConfigEnabledParam", "budget_tokens"): [100, 200],
            ("ToolChoiceToolParam", "name"): NAMES,
        },
        before={"UserMessageParam": [USE]},
        after={"AssistantMessageParam": TURN},
    ),
    "/v1/embeddings": Samples({}),
}
SAMPLES["/v1/messages/count_tokens"] = SAMPLES["/v1/messages"]

# Nested fields that a walk goes through at least, without those of refused objects (openai 3.54.0, anthropic 2.12.0).
LEAST = {"/v1/chat/completions": 45, "/v1/completions": 2, "/v1/responses": 200, "/v1/embeddings": 0}
LEAST |= {"/v1/messages": 105, "/v1/messages/count_tokens": 105}

# What else a body needs for objects in this field to mean something.
AROUND: dict[tuple[str, str], Json] = {
    ("/v1/chat/completions", "tool_choice"): {"tools": CHAT_TOOLS},
    ("/v1/responses", "reasoning"): {"input": REASONED},
    ("/v1/responses", "tool_choice"): {"tools": FLAT_TOOLS},
    ("/v1/messages", "tool_choice"): {"tools": CLAUDE_TOOLS},
    ("/v1/messages/count_tokens", "tool_choice"): {"tools": CLAUDE_TOOLS},
    ("/v1/chat/completions", "stream_options"): {"stream": True},
    ("/v1/completions", "stream_options"): {"stream": True},
    ("/v1/responses", "stream_options"): {"stream": True},
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    folder = tmp_path_factory.mktemp("run")
    with running(
        folder, template=TEMPLATE, media_of=lambda s: MediaLoader(PROCESSOR, s), tool_parser="hermes",
        reasoning_parser="think",
    ) as agent:  # fmt: skip
        yield agent


@pytest.fixture(scope="module")
def walks(agent: AgentServer) -> dict[str, Walk]:
    """All routes walked; first what references and compactions in the samples refer to is made."""
    agent.reset("", "One.", "Two.")
    stored = [{"type": "message", "role": "user", "id": f"msg_{name}", "content": name} for name in "ab"]
    assert agent.server.http.post("/v1/responses", json={"input": stored}).status_code == 200
    packed = [agent.server.http.post("/v1/responses/compact", json={"input": "Go"}).json() for _ in range(2)]
    contents = [item["encrypted_content"] for made in packed for item in made["output"] if item["type"] == "compaction"]
    values = SAMPLES["/v1/responses"].values | {("ResponseCompactionItemParamParam", "encrypted_content"): contents}
    samples = SAMPLES | {"/v1/responses": dataclasses.replace(SAMPLES["/v1/responses"], values=values)}
    return {path: Walk(agent, path, samples[path]) for path in samples}


class Walk:
    """Goes through a route's request types; `acting`, `without_effect` and `faults` are what it found."""

    def __init__(self, agent: AgentServer, path: str, samples: Samples) -> None:
        self.agent = agent
        self.path = path
        self.samples = samples
        self.without_effect: set[str] = set()
        self.acting: set[str] = set()
        self.faults: list[str] = []
        self.num_fields = self.num_refused_objects = self.num_sent = 0
        self._seen: set[tuple[Any, str]] = set()
        body, types = ROUTES[self.path]
        if path == "/v1/responses":
            body = body | {"store": False}  # what a case stores is not there for others to refer to
        for kind in types:
            top = Object(kind, "", lambda value: value, samples)
            for field in top.fields:
                around = body | AROUND.get((self.path, field), {})

                def put(value: Json, around: Json = around, field: str = field) -> Json:
                    return around | {field: value[field]}

                for child in Object(kind, "", put, samples).children(field):
                    self._object(child, field, ())

    def _object(self, here: Object, top: str, above: tuple[Any, ...]) -> None:
        if here.kind in above or (here.kind, here.label) in self._seen:
            return
        self._seen.add((here.kind, here.label))
        status, seen = self._send(here, here.smallest, top)
        if status != 200:
            named = self._named(seen)
            is_inside = named.startswith(f"{here.path}.") and re.search("supported|invalid enum value", seen["message"])
            if is_inside or named == here.path or named in map(here.place, here.tags):
                self.num_refused_objects += 1
            else:
                self.faults.append(f"{here.path} ({here.kind.__name__}): give a valid sample: {seen}")
            return
        for field in here.fields:
            if field not in here.tags and not here.tells_nothing(field):
                self._field(here, field, top, seen)
            for child in here.children(field):
                self._object(child, top, (*above, here.kind))

    def _field(self, here: Object, field: str, top: str, without: object) -> None:
        self.num_fields += 1
        place = here.place(field)
        outcomes = [] if field in here.smallest else [without]
        num_refused = 0
        for value in here.values(field):
            status, seen = self._send(here, {**here.smallest, field: value}, top)
            if status == 200:
                outcomes.append(seen)
            elif not self._named(seen).startswith(place):
                self.faults.append(f"{place} ({here.kind.__name__}) = {value!r}: {status} {seen}")
            else:
                num_refused += 1
        if not num_refused and len(outcomes) < 2 and not here.is_given(field) and not any(here.children(field)):
            self.faults.append(f"{place} ({here.kind.__name__}): give samples")
        elif len(outcomes) > 1 and all(seen == outcomes[0] for seen in outcomes):
            self.without_effect.add(here.labelled(field))
        elif num_refused or len(outcomes) > 1:
            self.acting.add(here.labelled(field))

    def _send(self, here: Object, value: Json, top: str) -> tuple[int, Any]:
        self.num_sent += 1
        return observe(self.agent, self.path, here.put(value), top)

    def _named(self, error: Json) -> str:
        """The field that an error names, without the numbers of elements."""
        is_messages = self.path.startswith("/v1/messages")
        named = error["message"].split(": ")[0] if is_messages else error["param"] or ""
        return re.sub(r"\[[^]]*\]", "", named)


@pytest.mark.parametrize("path", SAMPLES)
def test_nested_fields_act_or_are_refused_by_name(walks: dict[str, Walk], path: str) -> None:
    walk = walks[path]
    assert not walk.faults, "\n".join(walk.faults)
    assert walk.num_fields >= LEAST[path], "the SDK's types were not read"


SHORT = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/responses": "responses",
         "/v1/messages": "messages"}  # fmt: skip


def documented(route: str) -> dict[str, re.Pattern[str]]:
    """What the page says has no effect: as it is written there -> what it means."""
    section = PAGE.read_text().split("## Fields inside fields\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    names = [n for routes, cell in rows if route in routes.strip().split(", ") for n in re.findall(r"`([^`]+)`", cell)]
    return {name: re.compile(re.escape(name).replace(r"\*", ".*")) for name in names}


@pytest.mark.parametrize("path", SHORT)
def test_the_page_has_just_those_nested_fields_that_have_no_effect(walks: dict[str, Walk], path: str) -> None:
    said = documented(SHORT[path])
    walk = walks[path]
    unsaid = {field for field in walk.without_effect if not any(p.fullmatch(field) for p in said.values())}
    assert not unsaid, "taken, without effect, and not in the table"
    empty = {name for name, p in said.items() if not any(p.fullmatch(field) for field in walk.without_effect)}
    assert not empty, "in the table, and no such field is without effect"
    untrue = {field for field in walk.acting if any(p.fullmatch(field) for p in said.values())}
    assert not untrue, "in the table, and it acts"


def test_counting_ignores_what_is_no_part_of_the_prompt_and_nothing_else(walks: dict[str, Walk]) -> None:
    made, counted = walks["/v1/messages"], walks["/v1/messages/count_tokens"]
    assert counted.acting <= made.acting
    assert counted.without_effect <= made.acting | made.without_effect
    assert {f.split("[")[0].split(".")[0] for f in counted.without_effect & made.acting} <= {
        "messages", "output_config", "thinking", "tool_choice", "tools",
    }  # fmt: skip
