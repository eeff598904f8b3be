"""One log format for every process: time, process, level, text, on standard error."""

from __future__ import annotations

import logging
import sys


def set_up(process: str, level: str) -> logging.Logger:
    """The process's logger. No prompt, output or key is ever logged at info or above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process:<9} %(levelname)-7s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "numba"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return logging.getLogger(process)
