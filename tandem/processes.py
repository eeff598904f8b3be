"""Runs every line of the Procfile under `honcho start`: `python -m tandem.processes`, which `tandem serve` becomes.

honcho exits with 128 + the signal that stopped it. Ctrl-C and SIGTERM are the usual ways to end a server, so they are a
success here; a process that gave up keeps its own exit code.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from honcho.command import main as honcho

PROCFILE = Path(__file__).resolve().parent.parent / "Procfile"
ORDERLY = frozenset({128 + signal.SIGINT, 128 + signal.SIGTERM})


def main() -> int:
    try:
        honcho(["start", "-f", str(PROCFILE), "-d", str(PROCFILE.parent), "-e", ""])  # no .env: it would hide settings
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0 if code in ORDERLY else code
    return 0


if __name__ == "__main__":
    sys.exit(main())
