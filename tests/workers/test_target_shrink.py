"""Blocks are loaded beside the steps, so a load may be done before a Shrink that was sent ahead of it."""

from __future__ import annotations

from shared.messages import LoadBlocks, Release, Shrink
from workers.target import _keep_loading


def test_what_is_loaded_meanwhile_is_not_given_back() -> None:
    shrink = Shrink(kept_blocks=[1], free_states=[3, 4, 5])
    waiting = [Release(epoch=1, slots=[0]), Release(epoch=1, slots=[], shrink=shrink)]
    _keep_loading(LoadBlocks(epoch=1, load_id=1, hashes=[b"a", b"b"], block_ids=[7, 8], states={1: 4}), waiting)
    assert shrink.kept_blocks == [1, 7, 8]
    assert shrink.free_states == [3, 5]
