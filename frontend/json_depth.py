"""How deep a body's JSON may nest. What reads it later (templates, schemas, grammars) walks it recursively."""

from __future__ import annotations

from shared.errors import InvalidRequest

MAX_DEPTH = 64


def check_depth(raw: bytes, content: object) -> None:
    """Args:
        raw: the body; one with few brackets cannot be deep, which spares the walk for most.
        content: what it decodes to.
    Raises:
        InvalidRequest: it nests deeper than MAX_DEPTH.
    """
    if raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH:
        return
    level: list[object] = [content]
    for _ in range(MAX_DEPTH + 1):
        inner: list[object] = []
        for value in level:
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            inner += (item for item in items if isinstance(item, (dict, list)))
        if not inner:
            return
        level = inner
    raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels")
