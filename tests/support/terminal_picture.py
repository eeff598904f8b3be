"""The terminal picture of the README: python -m tests.support.terminal_picture docs/images/terminal.svg [MODEL]

What a real terminal showed of `tandem chat` and `tandem status`, beside a real server with the embedded model (or
MODEL) and drafts out of text.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

from tests.support.server import Server
from tests.support.terminal import Terminal

WIDTH, HEIGHT = 110, 50
QUESTIONS = ("List five fruits, one on each line.", "Repeat that list twice.")


def main(path: Path, model: str = "default") -> None:
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.Stream(screen)
    with tempfile.TemporaryDirectory() as scratch, Server(model, Path(scratch), draft_tokens=4) as server:
        variables = {"TANDEM_PORT": str(server.port), "COLUMNS": str(WIDTH)}

        def show(said: str) -> None:
            stream.feed(said.replace(str(server.port), "8080"))

        show("$ tandem chat --temperature 0\r\n")
        with Terminal(Path(scratch), "chat", "--temperature", "0", **variables) as chat:
            show(chat.expect("> "))
            for question in QUESTIONS:
                chat.type(question)
                show(chat.expect(r"first token in [^\n]*\n\s*> "))
            chat.type("/quit")
            show(chat.end()[1].replace("\n", "\r\n"))
        show("$ tandem status --once\r\n")
        with Terminal(Path(scratch), "status", "--once", **variables) as status:
            show(status.end()[1].replace("\n", "\r\n"))
    path.write_text(picture(screen))


def picture(screen: pyte.Screen) -> str:
    """The screen's lines as an SVG, colours included; fonts are the reader's own."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    last = max(row for row in range(HEIGHT) if screen.display[row].strip())
    for row in range(last + 1):
        line = Text()
        for column in range(WIDTH):
            char = screen.buffer[row][column]
            style = f"{'bold ' if char.bold else ''}{_colour(char.fg)}".strip()
            line.append(char.data, style=style)
        line.rstrip()
        console.print(line, soft_wrap=True)
    return re.sub(r"\s*@font-face \{.*?\}", "", console.export_svg(title="tandem"), flags=re.DOTALL)


def _colour(name: str) -> str:
    if name == "default":
        return ""
    return {"brown": "yellow"}.get(name, name if name.isalpha() else f"#{name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
