"""Chat templates: the usual globals, and errors that become the client's."""

from __future__ import annotations

import pytest

from frontend.chat_template import ChatTemplate
from shared.errors import BadModel, InvalidRequest

HI = [{"role": "user", "content": "Hi"}]


def render(source: str, **kwargs: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(HI, **kwargs)  # type: ignore[arg-type]


def test_special_tokens_kwargs_and_control_flow() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% break %}{% endfor %}{{ thinking }}"
    assert render(source, kwargs={"thinking": False}) == "<s>HiFalse"


def test_blocks_are_trimmed_and_generation_marks_are_transparent() -> None:
    assert render("  {% generation %}\nx\n  {% endgeneration %}\ny") == "x\ny"


def test_tojson_does_not_escape_html_or_unicode() -> None:
    assert render("{{ tools | tojson }}", tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'


def test_strftime_now_gives_the_year() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ messages[5].content.x }}", "{{ 1 + 'a' }}"]
)
def test_a_refusing_template_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_the_sandbox_keeps_python_out() -> None:
    with pytest.raises(InvalidRequest):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest):
        render("{{ messages.append(1) }}")


def test_a_template_that_does_not_parse_stops_start_up() -> None:
    with pytest.raises(BadModel):
        ChatTemplate("{% for %}", {})


PARTS = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"


def test_a_template_that_knows_parts_only_gets_texts_as_parts() -> None:
    assert render(PARTS + "{% endfor %}") == "Hi"
    template = ChatTemplate(PARTS + "{{ m.content is string }}{% endfor %}", {})
    shown = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, *HI]
    assert template.render(shown) == "aFalseHiFalse"
    calls = [{"role": "assistant", "content": "", "tool_calls": []}]
    assert template.render(calls) == "False"


def test_a_template_that_knows_texts_gets_them_as_they_are() -> None:
    source = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    assert render(source + "{{ messages[0].content is string }}") == "HiTrue"
    assert render("{{ messages[0].content is string }}") == "True"
