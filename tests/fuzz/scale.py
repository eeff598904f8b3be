"""How much: short numbers in `make test`, long ones in `make fuzz` (FUZZ_LONG=1)."""

from __future__ import annotations

import os

IS_LONG = os.environ.get("FUZZ_LONG", "") == "1"
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def count(short: int, long: int) -> int:
    return long if IS_LONG else short
