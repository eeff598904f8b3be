"""transformers' Gemma 4 assistant, tiny and random."""

from __future__ import annotations

from tests.workers.gemma import hf

TEXT = {
    **{k: v for k, v in hf.GEMMA4.items() if k != "vocab_size_per_layer_input"}, "vocab_size_per_layer_input": 0,
    "num_key_value_heads": 2, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip
CASES = {
    "whole head": {},
    "centroids": {"use_ordered_embeddings": True, "num_centroids": 8, "centroid_intermediate_top_k": 3},
}


def save(transformers, folder, backbone, overrides, scale=0.1):
    """The reference, written to `folder`."""
    import torch

    config = transformers.Gemma4AssistantConfig(text_config=TEXT, backbone_hidden_size=backbone, **overrides)
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma4AssistantForCausalLM(config), scale)
    if reference.masked_embedding is not None:
        with torch.no_grad():
            reference.masked_embedding.token_ordering.copy_(torch.randperm(hf.VOCAB))
    reference.save_pretrained(folder)
    return reference
