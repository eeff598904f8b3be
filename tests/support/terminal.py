"""`tandem` in a real terminal: a pseudo-terminal with a home of its own, so that no setting of the machine counts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

import pexpect

from tests.support.server import REPOSITORY

PATIENCE_S = 90.0  # a slow machine, several test runs at once


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TANDEM_", "HF_")) and k != "XDG_CONFIG_HOME"}
    return kept | {
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(home),
        "TERM": "xterm",
        "COLUMNS": "160",
        "MLX_DISABLE_COMPILE": "1",
        "TANDEM_BLAS_THREADS": "1",
        "TANDEM_CACHE_DIR": str(home / "cache"),
        **variables,
    }


class Terminal:
    """`with Terminal(tmp_path, "chat", "--port", "1") as t: t.expect("> ")`; it starts in `home`."""

    def __init__(self, home: Path, *arguments: str, preexec: object = None, **variables: str) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "tandem", *arguments],
            cwd=str(home),
            env=environment(home, **variables),
            encoding="utf-8",
            codec_errors="replace",
            timeout=PATIENCE_S,
            dimensions=(50, 160),
            preexec_fn=preexec,  # type: ignore[arg-type] # a function without arguments
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.child.close(force=True)

    def expect(self, pattern: str) -> str:
        """Wait for `pattern`; what stood before it and the match itself."""
        self.child.expect(pattern)
        return str(self.child.before) + str(self.child.match.group(0))

    def type(self, line: str) -> None:
        self.child.sendline(line)

    def ctrl_c(self) -> None:
        self.child.sendcontrol("c")

    def ctrl_d(self) -> None:
        self.child.sendeof()

    def end(self) -> tuple[int, str]:
        """Wait for its end; the exit code and what it said since the last `expect`."""
        self.child.expect(pexpect.EOF)
        said = str(self.child.before)
        self.child.close()
        assert self.child.exitstatus is not None, f"killed by signal {self.child.signalstatus}"
        return self.child.exitstatus, said.replace("\r\n", "\n")


def tandem(home: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run one command to its end; exit code and all that the terminal showed."""
    with Terminal(home, *arguments, **variables) as terminal:
        return terminal.end()
