"""transformers' Qwen-VL models, tiny and random, and prompts with images for both sides."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import hashlib

import numpy as np

from frontend.media.processors.qwen import QwenProcessor
from shared.messages import MediaItem, MediaTensor
from tests.support.media_oracle import Prompt, arrays_of, pair

VOCAB = 96
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
TEXT_2 = {
    **TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 2, 1]},
}  # fmt: skip
TEXT_3 = {
    **TEXT, "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]},
}  # fmt: skip
TEXT_HYBRID = {
    **TEXT, "num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXTS = {
    "qwen2_vl": TEXT_2, "qwen2_5_vl": TEXT_2, "qwen3_vl": TEXT_3, "qwen3_vl_moe": TEXT_3 | MOE, "qwen3_5": TEXT_HYBRID,
    "qwen3_5_moe": TEXT_HYBRID | MOE | {"shared_expert_intermediate_size": 24},
}  # fmt: skip
NAMES_TIMES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")  # their prompts name each pair of frames' time
VISION = {
    "qwen2_vl": {"depth": 3, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4},
    "qwen2_5_vl": {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "out_hidden_size": 32, "fullatt_block_indexes": [1], "tokens_per_second": 4,
    },
    "qwen3_vl": {
        "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]
VISION["qwen3_5"] = VISION["qwen3_5_moe"] = {
    name: value for name, value in VISION["qwen3_vl"].items() if name != "deepstack_visual_indexes"
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make(transformers, folder, model_type, text=None, vision=None, seed=0, scale=0.1, **more):
    """transformers' model and ours with the same weights."""
    parts = {
        "text_config": {**TEXTS[model_type], **(text or {})},
        "vision_config": {**VISION[model_type], **(vision or {})},
    }
    return pair(transformers, folder, model_type, {**parts, **IDS, **more}, seed, scale)


def image(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def item(kind, frames, config, seconds=1.0):
    """`frames` (T, height, width, 3) as the frontend would send them, not placed yet."""
    t = -(-len(frames) // config.temporal_patch_size)
    grid = [t, frames.shape[1] // config.patch_size, frames.shape[2] // config.patch_size]
    arrays = {
        "frames": np.ascontiguousarray(frames), "mean": np.array(MEAN, np.float32), "std": np.array(STD, np.float32),
    }  # fmt: skip
    tensors = [
        MediaTensor(name=name, dtype=str(a.dtype), shape=list(a.shape), data=a.tobytes()) for name, a in arrays.items()
    ]
    return MediaItem(
        kind=kind, start=0, num_tokens=t * grid[1] * grid[2] // config.merge_size**2, grid=grid,
        content_hash=hashlib.sha256(frames.tobytes()).digest(), tensors=tensors, seconds_per_grid=seconds,
    )  # fmt: skip


def prompt(pieces):
    """From token lists and unplaced items."""
    import msgspec

    tokens, media = [], []
    for piece in pieces:
        if isinstance(piece, list):
            tokens += piece
            continue
        tokens.append(VISION_START)
        media.append(msgspec.structs.replace(piece, start=len(tokens)))
        tokens += [IMAGE if piece.kind == "image" else VIDEO] * piece.num_tokens + [VISION_END]
    return Prompt(tokens, media)


def patches_of(model, media):
    """The encoder's input of an item (n, channels * frames * size * size)."""
    arrays = arrays_of(media)
    return model.vision_tower.patches(arrays["frames"], arrays["mean"], arrays["std"])


def hf_inputs(model, made):
    import torch

    inputs = {}
    kinds = [0] * len(made.tokens)
    for kind, number, pixels, grid in (
        ("image", 1, "pixel_values", "image_grid_thw"), ("video", 2, "pixel_values_videos", "video_grid_thw"),
    ):  # fmt: skip
        chosen = [m for m in made.media if m.kind == kind]
        for m in chosen:
            kinds[m.start : m.start + m.num_tokens] = [number] * m.num_tokens
        if chosen:
            inputs[pixels] = torch.tensor(np.concatenate([np.array(patches_of(model, m)) for m in chosen]))
            inputs[grid] = torch.tensor([m.grid for m in chosen])
    if any(m.kind == "video" for m in made.media) and model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([m.seconds_per_grid for m in made.media if m.kind == "video"])
    if made.media:
        inputs["mm_token_type_ids"] = torch.tensor([kinds])
    return inputs


def hf_logits(reference, model, made, output=()):
    import torch

    inputs = hf_inputs(model, made)
    if "mm_token_type_ids" in inputs and output:
        more = torch.zeros((1, len(output)), dtype=torch.long)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], dim=1)
    with torch.no_grad():
        return reference(torch.tensor([[*made.tokens, *output]]), use_cache=False, **inputs).logits[0].numpy()


def processor(config):
    """The frontend's processor with limits that suit tiny images."""
    return QwenProcessor(
        patch_size=config.patch_size, merge_size=config.merge_size, temporal_patch_size=config.temporal_patch_size,
        min_pixels=8 * 8, max_pixels=64 * 64, mean=MEAN, std=STD, image_token_id=IMAGE,
    )  # fmt: skip
