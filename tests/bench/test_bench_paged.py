"""The benchmark of the layouts, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import paged

pytestmark = pytest.mark.mlx


def test_both_layouts_are_timed_and_agents_share_their_prefix(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ["--shape", "tiny", "--batches", "1,2", "--context", "64", "--agents", "3", "--shared", "256"]
    assert paged.main([*arguments, "--json", str(path)]) == 0
    slots, blocks = json.loads(path.read_text())["layouts"]
    assert [row["batch"] for row in slots["steps"]] == [row["batch"] for row in blocks["steps"]] == [1, 2]
    assert all(row["decode_ms"] > 0 and row["verify_ms"] > 0 for row in slots["steps"])
    # 256 tokens and 32 more are 9 blocks. Each of the others has seven of the eight blocks of the prompt in common
    # with the first, since its last token is computed anew, and two of its own.
    assert blocks["shared"]["blocks_alone"] == 9
    assert blocks["shared"]["blocks_together"] <= 7 + 3 * 2 + 1
