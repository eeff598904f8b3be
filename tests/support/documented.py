"""Command lines that the documentation shows: in blocks of shell and between backticks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.server import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "SECURITY.md", "bench/README.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:tandem|make|python -m|curl) [^`\n]+)`")
PROGRAMS = ("tandem", "make", "python", "curl")
ASSIGNMENT = re.compile(r"^[A-Z][A-Z0-9_]*=")


@dataclass(frozen=True)
class Shown:
    page: str
    words: tuple[str, ...]  # without assignments before the program; the program is the first
    in_block: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def lines(page: Path) -> Iterator[Shown]:
    """Every command line of a page. Blocks without a language count where a line begins like a command."""
    text = page.read_text()
    name = page.relative_to(REPOSITORY).as_posix()
    for language, code in BLOCK.findall(text):
        if language not in ("sh", "console", ""):
            continue
        for line in code.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ")
            if command.strip() and (language == "sh" or command.split(maxsplit=1)[0] in PROGRAMS):
                yield Shown(name, split(command), in_block=True)
    for line in INLINE.findall(text):
        yield Shown(name, split(line), in_block=False)


def split(line: str) -> tuple[str, ...]:
    """Words of a shell line, without its comment, redirection, substitution around it and assignments before it; a
    number that is left open (N) is 1."""
    line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line.strip())
    words = shlex.split(line.replace("[", "").replace("]", "") if "[-" in line else line, comments=True)
    while words and ASSIGNMENT.match(words[0]):
        words.pop(0)
    end = next((i for i, word in enumerate(words) if word in ("<", ">", "&&", "|")), len(words))
    return tuple("1" if word == "N" else word for word in words[:end])
