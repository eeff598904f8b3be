"""Why a server takes no tools: the 400 names the reason that holds, and a setting only where it would help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shared.config import Settings
from tests.frontend.conftest import TEMPLATE, RunningServer, byte_text
from tests.frontend.test_fields import CHAT_TOOLS, CLAUDE_TOOLS, FLAT_TOOLS, TURN

TAKES_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + TEMPLATE
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURN, "tools": CHAT_TOOLS},
    "/v1/responses": {"input": "Go", "tools": FLAT_TOOLS},
    "/v1/messages": {"model": "default", "max_tokens": 5, "messages": TURN, "tools": CLAUDE_TOOLS},
}


@pytest.mark.parametrize(
    ("template", "parser", "reason", "names_setting"),
    [
        (TEMPLATE, "", "no place for them", False),
        (TEMPLATE, "hermes", "no place for them", False),
        (TAKES_TOOLS, "none", "TANDEM_TOOL_PARSER=none", True),
        (TAKES_TOOLS, "", "TANDEM_TOOL_PARSER can name one", True),
        (None, "hermes", "no chat template", False),
    ],
)
@pytest.mark.usefixtures("engine")
def test_the_reason_is_the_one_that_holds(
    settings: Settings, start_server: Callable[..., RunningServer], template: str | None, parser: str, reason: str,
    names_setting: bool,
) -> None:  # fmt: skip
    chosen = msgspec.structs.replace(settings, tool_parser=parser)
    server = start_server(byte_text(chat_template=template), settings=chosen)
    server.wait_status("/health", 200)
    for path, body in BODIES.items():
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith("tools: ")
        assert reason in message
        assert ("TANDEM_TOOL_PARSER" in message) == names_setting
