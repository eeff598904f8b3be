"""A tiny random target, documents for it, and drafters of every kind."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from bench.training import build
from bench.training.documents import Documents
from bench.training.target import load_target
from shared.config import Settings
from tests.support import tiny_model

KINDS = {
    "dflash": build.Choice("dflash", num_layers=2, block_size=5, mask_token_id=7, taps=(0, 1, 2)),
    "dflash-bidirectional": build.Choice(
        "dflash", num_layers=2, block_size=5, mask_token_id=7, is_causal=False, taps=(0, 1, 2)
    ),
    "eagle3": build.Choice("eagle3", num_steps=4, taps=(0, 1, 2)),
    "mtp": build.Choice("mtp", num_steps=3),
}


def tiny_target(folder):
    return load_target(str(tiny_model.write(folder)), range(3), dtype="float32", settings=Settings())


def random_documents(num=6, low=30, high=60, vocab=200, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high, num).astype(np.int32)
    return Documents(
        rng.integers(5, vocab, int(lengths.sum())).astype(np.uint16),
        lengths,
        rng.integers(3, 12, num).astype(np.int32),
        np.zeros(num, np.float32),
        np.zeros(num, np.uint8),
        np.zeros(num, bool),
    )


def make(kind, target, seed=3, scaled=False):
    """(drafter, its random parameters), every norm and small projection stirred so that an error shows."""
    drafter = build.drafter(KINDS[kind], target)
    params = drafter.initialise(seed, target, norm_scale=0.5)
    key = mx.random.key(seed)
    for name, value in params.items():
        key, draw = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=draw)
        params[name] = value + 0.3 * noise if value.ndim == 1 else value + 0.1 * noise
    if scaled and drafter.taps:
        drafter.tap_scale = mx.random.uniform(0.5, 2.0, (params["fc.weight"].shape[1],), key=key)
    mx.eval(params)
    return drafter, params


def spoken_documents(target, num=6, prompt=6, length=40, seed=0):
    """Documents whose answers the target gives greedily, so that there is something to learn."""
    tokens = np.random.default_rng(seed).integers(5, 200, (num, prompt)).astype(np.int32)
    while tokens.shape[1] < length:
        _, final = target.forward(mx.array(tokens))
        following = mx.argmax(final[:, -1] @ target.head.T, axis=-1)
        tokens = np.concatenate([tokens, np.array(following, dtype=np.int32)[:, None]], axis=1)
    return Documents(
        tokens.reshape(-1).astype(np.uint16),
        np.full(num, length, np.int32),
        np.full(num, prompt, np.int32),
        np.zeros(num, np.float32),
        np.zeros(num, np.uint8),
        np.zeros(num, bool),
    )
