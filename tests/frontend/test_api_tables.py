"""docs/api-compatibility.md tells the truth: it has each field of our schemas and of the SDKs, rightly labelled."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from frontend.messages_schemas import MessagesBody
from frontend.responses.schemas import ResponsesBody
from frontend.schemas import Body, ChatBody, CompletionBody
from tests.frontend.test_fields import ROUTES, WITHOUT_EFFECT, fields_of

PAGE = Path(__file__).parents[2] / "docs" / "api-compatibility.md"
BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
}


def table(path: str) -> dict[str, tuple[str, bool]]:
    """Field -> (what is said of it, whether it is marked as none of the API's own)."""
    section = PAGE.read_text().split(f"## POST {path}\n")[1].split("\n## ")[0]
    rows: dict[str, tuple[str, bool]] = {}
    for line in section.splitlines():
        if not line.startswith(("| `", "| *")):
            continue
        names, said = (cell.strip() for cell in line.split("|")[1:3])
        for star, name in re.findall(r"(\*?)`(\w+)`", names):
            assert name not in rows, f"{name} has two rows"
            rows[name] = said, star == "*"
    return rows


@pytest.mark.parametrize("path", BODIES)
def test_each_field_is_in_its_table(path: str) -> None:
    ours = {field.encode_name for field in msgspec.structs.fields(BODIES[path])}
    theirs = fields_of(ROUTES[path][1])
    rows = table(path)
    assert set(rows) == ours | theirs
    assert {name for name, (said, _) in rows.items() if said == "400"} == theirs - ours
    assert {name for name, (_, is_extension) in rows.items() if is_extension} == ours - theirs
    without_effect = {field for route, field in WITHOUT_EFFECT if route == path} & ours & theirs
    assert {name for name in ours & theirs if rows[name][0] == "no effect"} == without_effect
    assert {said for said, _ in rows.values()} <= {"acts", "no effect", "400"}
