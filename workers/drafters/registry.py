"""From a `DrafterConfig` to the objects that run: the fusion for the target process, the drafter for its own."""

from __future__ import annotations

import mlx.core as mx

from workers.drafters.assistant import AssistantDrafter
from workers.drafters.base import Drafter, Embed, Head
from workers.drafters.config import DrafterConfig
from workers.drafters.dflash import DFlashDrafter
from workers.drafters.eagle3 import Eagle3Drafter
from workers.drafters.fusion import FUSION_PREFIXES, Fusion, TapFusion, final_hidden, joined
from workers.drafters.layers import Linear, Weights
from workers.drafters.mtp import MTPDrafter
from workers.drafters.tensors import load_arrays, read_quantization
from workers.models.qwen.experts import split_experts


def load_fusion(config: DrafterConfig, dtype: mx.Dtype) -> Fusion | None:
    """The target's part, its few tensors read and evaluated; None for a drafter that needs token ids only.

    Raises:
        BadModel: a tensor is missing.
    """
    if config.feature == "none":
        return None
    if config.feature == "final_hidden":
        return final_hidden
    if config.feature == "hidden_and_kv":
        return joined
    arrays = load_arrays(config.path, config.kind, dtype, read_quantization(config.path), FUSION_PREFIXES)
    mx.eval(arrays)  # the file is read now, not in the first step
    return TapFusion(Weights(arrays, config), config)


def load_drafter(
    config: DrafterConfig, dtype: mx.Dtype, embed: Embed | None = None, head: Head | None = None
) -> Drafter:
    """A feature drafter with its weights read and evaluated.

    Args:
        embed, head: the target's, for a checkpoint without its own (see `tables`).
    Raises:
        BadModel: a tensor is missing or misshapen, or a table is needed and not given.
        ValueError: a "model" drafter, which `causal_lm.CausalLMDrafter` wraps.
    """
    if config.kind == "model":
        raise ValueError("a causal language model is wrapped by causal_lm.CausalLMDrafter")
    if config.kind == "assistant":
        return AssistantDrafter(config, dtype, embed)
    arrays = load_arrays(config.path, config.kind, dtype, read_quantization(config.path))
    if config.feature == "taps":  # the target's part stays there
        arrays = {name: array for name, array in arrays.items() if not name.startswith(FUSION_PREFIXES)}
    if config.num_chosen_experts:
        arrays = split_experts(arrays, config.hidden_size)
    weights = Weights(arrays, config)
    drafter: Drafter
    match config.kind:
        case "dflash":
            drafter = DFlashDrafter(weights, config, embed, head)
        case "eagle3":
            drafter = Eagle3Drafter(weights, config, embed, head)
        case "mtp":
            drafter = MTPDrafter(weights, config, embed, head)
    mx.eval(arrays)  # the files are read now, not in the first draft
    return drafter


def tables(embedding: mx.array, head: mx.array | None = None) -> tuple[Embed, Head]:
    """(embed, head) from the target's arrays, each (V, H); a tied head when only one is given."""
    return embedding.__getitem__, Linear(embedding if head is None else head)
