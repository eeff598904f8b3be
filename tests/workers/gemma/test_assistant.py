"""Gemma 4's assistant against transformers: several tokens a draft, ragged batches, both heads."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import BadModel
from tests.workers.gemma import hf
from workers.drafters.gemma4_assistant import AssistantConfig, TargetRows, load_assistant

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

BACKBONE = 48
LENGTHS = (5, 30, 9, 10)  # below, beyond, and around the window
TEXT = {
    **{k: v for k, v in hf.GEMMA4.items() if k != "vocab_size_per_layer_input"}, "vocab_size_per_layer_input": 0,
    "num_key_value_heads": 2, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip
CASES = {
    "whole head": {},
    "centroids": {"use_ordered_embeddings": True, "num_centroids": 8, "centroid_intermediate_top_k": 3},
}


@pytest.fixture(autouse=True)
def _all_layers_may_share(monkeypatch):
    """transformers 5.23 cannot build its own assistant: it looks for a layer that writes keys, and there is none."""
    config = pytest.importorskip("transformers").Gemma4TextConfig
    own = config.kv_sharing_modes.fget

    def modes(self):
        return ["reuse"] * self.num_hidden_layers if self.num_kv_shared_layers == self.num_hidden_layers else own(self)

    monkeypatch.setattr(config, "kv_sharing_modes", property(modes))


def assistant(transformers, folder, overrides):
    import torch

    config = transformers.Gemma4AssistantConfig(text_config=TEXT, backbone_hidden_size=BACKBONE, **overrides)
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma4AssistantForCausalLM(config))
    if reference.masked_embedding is not None:
        reference.masked_embedding.token_ordering.copy_(torch.randperm(hf.VOCAB))
    reference.save_pretrained(folder)
    return reference, load_assistant(folder, mx.float32)


def target_rows(rng):
    """By layer kind (keys, values), each (B, heads, longest, head_dim)."""
    dims = {"sliding_attention": 16, "full_attention": 32}
    return {
        kind: [rng.standard_normal((len(LENGTHS), 2, max(LENGTHS), dim)).astype(np.float32) for _ in range(2)]
        for kind, dim in dims.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_transformers(transformers, tmp_path, case):
    """Four tokens a draft; each row's next input is its own last token and hidden row, its position stays."""
    import torch

    reference, model = assistant(transformers, tmp_path, CASES[case])
    rng = np.random.default_rng(3)
    table = rng.standard_normal((hf.VOCAB, BACKBONE)).astype(np.float32)
    rows = target_rows(rng)
    hidden = rng.standard_normal((len(LENGTHS), BACKBONE)).astype(np.float32)
    tokens = np.array([4, 8, 15, 16])
    ours = {kind: TargetRows(*(mx.array(a) for a in pair)) for kind, pair in rows.items()}
    theirs = torch.tensor(hidden)
    our_hidden, drafted = mx.array(hidden), []
    for _ in range(4):
        logits, our_hidden = model(mx.array(table[tokens]), our_hidden, ours, LENGTHS)
        for b, length in enumerate(LENGTHS):
            with torch.no_grad():
                expected = reference(
                    inputs_embeds=torch.cat([torch.tensor(table[tokens[b]]), theirs[b]])[None, None],
                    position_ids=torch.tensor([[length]]),
                    shared_kv_states={
                        kind: tuple(torch.tensor(a[b : b + 1, :, :length]) for a in pair) for kind, pair in rows.items()
                    },
                )
            got = np.array(logits[b])
            wanted = expected.logits[0, 0].numpy()
            if "centroids" in case:  # what stands for a token that was not scored depends on the batch there
                is_scored = wanted > wanted.min()
                assert is_scored.sum() == 3 * hf.VOCAB // 8
                np.testing.assert_allclose(got[is_scored], wanted[is_scored], rtol=0, atol=1e-4)
                assert got[~is_scored].max() < got[is_scored].min()
            else:
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
            np.testing.assert_allclose(
                np.array(our_hidden[b]), expected.last_hidden_state[0, 0].numpy(), rtol=0, atol=1e-4
            )
            theirs[b] = expected.last_hidden_state[0, 0]
        tokens = np.array(mx.argmax(logits, axis=-1))
        drafted.append(tokens.tolist())
    assert len({t for step in drafted for t in step}) > 3, "a draft that tells nothing"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma4_text"}, "no Gemma 4 assistant"),
        ({"text_config": {**TEXT, "enable_moe_block": True}}, "experts"),
        ({"use_ordered_embeddings": True, "num_centroids": 7}, "96 tokens in 7 clusters"),
    ],
)
def test_what_is_no_assistant_is_refused(changes, reason):
    config = {"model_type": "gemma4_assistant", "text_config": TEXT, "backbone_hidden_size": BACKBONE, **changes}
    with pytest.raises(BadModel, match=reason):
        AssistantConfig.from_hf(config)


def test_tensors_that_do_not_fit_are_refused(transformers, tmp_path):
    assistant(transformers, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone_hidden_size": BACKBONE + 1}))
    with pytest.raises(BadModel, match="pre_projection"):
        load_assistant(tmp_path, mx.float32)
