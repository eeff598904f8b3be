"""Worker processes start without PyTorch, which they never use.

mlx-lm imports transformers, and that imports PyTorch where the environment has it: on the machine measured, 3.0 of the
4.7 s of processor time that a target takes to start, as after each kill, and 87 MB of its resident memory.
"""

from __future__ import annotations

import sys


def leave_out() -> None:
    """Make PyTorch an absent package for this process. Call it before anything imports mlx-lm or transformers.

    Where something has imported it already, as a program that uses Tandem in its own process may have, nothing changes.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: "not found", as the import system defines
