"""mlx-lm's architectures on our caches: chunked prefill and batched decode equal its own output for one sequence."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from shared.errors import BadModel
from tests.workers.tiny_architectures import REFUSED, RUNS, VOCAB, config_of
from workers.cache.store import CacheStore
from workers.early_start import install_starts
from workers.load.folder import mlx_lm_classes
from workers.models.mlxlm import MlxLmModel, adapted
from workers.viewed_weights import view_weights

pytestmark = pytest.mark.mlx

PROMPT_LENGTHS = (5, 12, 19)  # the sliding layers' window is 8
NUM_DECODED = 8
FIRST_CHUNK = 4


def make(name, overrides):
    config = config_of(name, overrides)
    mx.random.seed(7)
    model_class, args_class = mlx_lm_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    return model


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, n).tolist() for n in PROMPT_LENGTHS]


# mlx-lm's prefill of these sees one position more than the ring that its decode keeps, as its own forward over the
# whole text shows; ours follows the forward.
UNCACHED_REFERENCE = {"plamo3"}


def alone_uncached(model, prompt):
    """Greedy tokens and logits by a forward over the whole text for each token."""
    text, rows = list(prompt), []
    for _ in range(NUM_DECODED):
        rows.append(np.array(model(mx.array([text]))[0, -1]))
        text.append(int(np.argmax(rows[-1])))
    return text[len(prompt) :], np.stack(rows)


def alone(model, prompt):
    """Greedy tokens and logits (NUM_DECODED, V) by mlx-lm's own caches."""
    cache = make_prompt_cache(model)
    inputs, tokens, rows = mx.array([prompt]), [], []
    for _ in range(NUM_DECODED):
        row = model(inputs, cache=cache)[0, -1]
        rows.append(np.array(row.astype(mx.float32)))
        tokens.append(int(np.argmax(rows[-1])))
        inputs = mx.array([tokens[-1:]])
    return tokens, np.stack(rows)


def batched(adapter, rows):
    """The same by our caches: each prompt in two chunks, then all rows decode together."""
    store = CacheStore(adapter.layer_specs(), [64], 32, mx.float32, True)
    slots = list(range(len(rows)))
    logits = [[] for _ in rows]

    def forward(members, starts, inputs):
        batch = store.open(members, starts, len(inputs[0]))
        out = adapter(mx.array([inputs[i] for i in batch.order]), cache=batch.layers)[:, -1]
        batch.close()
        for i, row in zip(batch.order, np.array(out.astype(mx.float32)), strict=True):
            yield members[i], row

    for slot, prompt in enumerate(rows):
        store.ensure(slot, 64)
        for first, end in ((0, FIRST_CHUNK), (FIRST_CHUNK, len(prompt))):
            for _, row in forward([slot], [first], [prompt[first:end]]):
                last = row
        logits[slot].append(last)
    for step in range(NUM_DECODED - 1):
        starts = [len(prompt) + step for prompt in rows]
        for slot, row in forward(slots, starts, [[int(np.argmax(logits[s][-1]))] for s in slots]):
            logits[slot].append(row)
    return [np.stack(rows) for rows in logits]


@pytest.mark.parametrize(("name", "overrides"), RUNS.items(), ids=RUNS)
def test_weights_are_viewed_in_every_architecture(name, overrides):
    """As on a GPU: with blocks that begin before the whole step is built."""
    model = adapted(make(name, overrides), name.partition("/")[0])
    inputs = mx.array([prompts()[1]])
    expected = np.array(model(inputs))
    install_starts(model)
    view_weights(model)
    np.testing.assert_array_equal(np.array(model(inputs)), expected)


@pytest.mark.parametrize("name", RUNS)
def test_chunked_prefill_and_batched_decode_equal_single_sequences(name):
    model = make(name, RUNS[name])
    adapter = adapted(model, name)
    assert adapter.vocab_size == VOCAB
    ours = batched(adapter, prompts())
    for prompt, rows in zip(prompts(), ours, strict=True):
        tokens, expected = (alone_uncached if name in UNCACHED_REFERENCE else alone)(model, prompt)
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-4 * max(1.0, np.abs(expected).max()))
        assert rows.argmax(axis=-1).tolist() == tokens


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_architecture_and_reason(name):
    overrides, reason = REFUSED[name]
    model = make(name, overrides)
    with pytest.raises(BadModel, match=f"{name}.*{reason}"):
        MlxLmModel(model, name)


@pytest.mark.skipif(mx.metal.is_available(), reason="bitnet's kernels are Metal's")
def test_kernels_that_the_machine_lacks_are_a_load_error():
    with pytest.raises(BadModel, match=r"bitnet.*Metal"):
        MlxLmModel(make("bitnet", {}), "bitnet")


@pytest.mark.skipif(importlib.util.find_spec("hf_olmo") is not None, reason="olmo's package is installed")
def test_an_architecture_whose_package_is_missing_is_a_load_error():
    with pytest.raises(BadModel, match=r"olmo.*package"):
        mlx_lm_classes({"model_type": "olmo"})


def test_unknown_model_type_is_named():
    with pytest.raises(BadModel, match="nonesuch"):
        mlx_lm_classes({"model_type": "nonesuch"})
    with pytest.raises(BadModel, match="unknown model_type"):
        mlx_lm_classes({"model_type": "../../evil"})
