"""transformers' Mistral 3 and Llava-Pixtral models, tiny and random, and prompts with images for both sides."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import json

import msgspec
import numpy as np
from PIL import Image

from frontend.media.loader import make_item
from frontend.media.parts import MediaPart
from frontend.media.processors import pixtral
from tests.support.media_oracle import Prompt, normalised, pair

VOCAB = 96
IMAGE, BREAK, END = 90, 91, 92
TOKEN_IDS = {"[IMG]": IMAGE, "[IMG_BREAK]": BREAK, "[IMG_END]": END}
TEXT = {
    "model_type": "mistral", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "sliding_window": None, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MINISTRAL = {
    **TEXT, "model_type": "ministral3", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5,
    },
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 3, "patch_size": 4, "image_size": 48,
}  # fmt: skip
TOP = {
    "mistral3": {"image_token_index": IMAGE},
    "llava": {"image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
}


def make(transformers, folder, model_type, text=None, vision=None, seed=0, scale=0.1, **more):
    """transformers' model and ours with the same weights."""
    parts = {"text_config": {**TEXT, **(text or {})}, "vision_config": {**VISION, **(vision or {})}}
    return pair(transformers, folder, model_type, {**parts, **TOP[model_type], **more}, seed, scale)


def processor(folder, **settings):
    """The frontend's, for the configuration in the folder."""
    config = json.loads((folder / "config.json").read_text())
    return pixtral.from_configs(config, settings, TOKEN_IDS.get)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def item(made, width, height, seed=0):
    """As the frontend would send it, not placed yet."""
    part = MediaPart(kind="image", param="x")
    return make_item(part, made.image(picture(width, height, seed)))


def prompt(made, pieces):
    """From token lists and unplaced items."""
    tokens, media = [], []
    for piece in pieces:
        if isinstance(piece, list):
            tokens += piece
            continue
        expanded, offset = made.expansion("image", piece.num_tokens, piece.grid)
        media.append(msgspec.structs.replace(piece, start=len(tokens) + offset))
        tokens += expanded
    return Prompt(tokens, media)


def hf_inputs(made):
    """Pixels padded to the largest image, as transformers' processor does, and the sizes."""
    import torch

    if not made.media:
        return {}
    images = [normalised(m) for m in made.media]
    sizes = [image.shape[:2] for image in images]
    height, width = (max(size[i] for size in sizes) for i in range(2))
    pixels = np.zeros((len(images), 3, height, width), np.float32)
    for padded, image in zip(pixels, images, strict=True):
        padded[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return {"pixel_values": torch.tensor(pixels), "image_sizes": torch.tensor(sizes)}


def hf_logits(reference, made, output=()):
    import torch

    with torch.no_grad():
        tokens = torch.tensor([[*made.tokens, *output]])
        return reference(tokens, use_cache=False, **hf_inputs(made)).logits[0].numpy()
