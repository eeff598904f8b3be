"""The float32 folder that the peers load: rows in Hugging Face's order, the same tokens as the GGUF names."""

from __future__ import annotations

import numpy as np

from bench.peer_model import unpermute


def test_unpermute_puts_rotary_pairs_half_a_head_apart() -> None:
    num_heads, head_dim, hidden = 3, 8, 5
    original = np.arange(num_heads * head_dim * hidden, dtype=np.float32).reshape(num_heads * head_dim, hidden)
    # What llama.cpp's converter does: split each head into halves and interleave them.
    stored = original.reshape(num_heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(num_heads * head_dim, hidden)
    assert not np.array_equal(stored, original)
    assert np.array_equal(unpermute(stored, num_heads), original)
