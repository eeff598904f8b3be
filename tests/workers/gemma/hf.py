"""transformers' Gemma models, tiny and random, and both sides' logits."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import numpy as np

from shared.model_files import ModelFiles
from workers.load import load

VOCAB = 96
WINDOW = 8
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}

GEMMA3 = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW, "layer_types": KINDS,
    "query_pre_attn_scalar": 24, "max_position_embeddings": 512,
}  # fmt: skip
GEMMA4 = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "layer_types": KINDS,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB, "max_position_embeddings": 512,
}  # fmt: skip


def randomise(model, scale=0.1, seed=0):
    """Every parameter and buffer that is saved, norms, biases and scalars included."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + scale * torch.randn(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(1.0 + scale * torch.randn(buffer.shape))
    return model.eval()


def text_model(transformers, model_type, overrides, seed=0):
    config = transformers.AutoConfig.for_model(model_type, **overrides)
    return randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed=seed)


def hf_logits(model, tokens, **more):
    import torch

    # transformers 5.23 drops positions before its KV-shared layers unless all hidden states are asked for, and fails
    # there for a model without per-layer embeddings.
    with torch.no_grad():
        output = model(torch.tensor(tokens), use_cache=False, output_hidden_states=True, **more)
    return output.logits.float().numpy()


def hf_agrees(model, prompt, output, forbidden=(), **more):
    """Is each token of `output` the reference's greedy choice after the prompt and those before it?"""
    logits = hf_logits(model, [prompt + output], **more)[0]
    logits[:, list(forbidden)] = -np.inf
    chosen = logits.argmax(axis=-1)
    return chosen[len(prompt) - 1 : -1].tolist() == output


def save_and_load(model, folder):
    model.save_pretrained(folder)
    return load(ModelFiles(name="m", folder=folder), "float32").model
