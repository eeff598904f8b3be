"""transformers' Idefics3 and SmolVLM, tiny and random, with tokenizers and prompts for both sides."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


import numpy as np
from PIL import Image

from frontend.media.loader import Loaded, MediaLoader, make_item
from frontend.media.parts import MediaPart
from frontend.media.processors import idefics3
from shared.config import Settings
from tests.support.media_oracle import Prompt, arrays_of, normalised, pair
from tests.support.tiled_text import IMAGE, TOKENIZERS

VOCAB = TOKENIZERS["smolvlm"].get_vocab_size()
TEXT = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
IMAGES = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}


def make(transformers, folder, model_type, text=None, vision=None, seed=0, scale=0.1, **more):
    """transformers' model and ours with the same weights."""
    parts = {"text_config": {**TEXT, **(text or {})}, "vision_config": {**VISION, **(vision or {})}}
    return pair(
        transformers, folder, model_type, {**parts, "image_token_id": IMAGE, "scale_factor": 2, **more}, seed, scale
    )


def picture(width, height, seed=0):
    """Smooth enough that resizing leaves differences between the tiles."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def processor(reference, settings=None):
    """The frontend's for a model of `make`."""
    return idefics3.from_configs(reference.config.to_dict(), {**IMAGES, **(settings or {})})


def hf_processor(transformers, model_type, made, settings=None):
    """transformers' for the same settings, with Pillow. SmolVLM's differs in its treatment of videos only."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[model_type])
    images = transformers.models.idefics3.image_processing_pil_idefics3.Idefics3ImageProcessorPil(
        **{**IMAGES, **(settings or {})}
    )
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=made.num_tile_tokens)


def prompt(made, model_type, text, pictures=()):
    """A rendered text with its images in the places of `<image>`, as the frontend makes it."""
    parts = [made.tiles(one) for one in pictures]
    part = MediaPart(kind="image", param="p")
    loaded = Loaded([make_item(part, x) for those in parts for x in those], [[x.lead for x in p] for p in parts])
    loader = MediaLoader(made, Settings())
    ids = TOKENIZERS[model_type].encode(loader.rewrite(text, loaded), add_special_tokens=False).ids
    return Prompt(*loader.place(ids, loaded))


def rows_of(model, media):
    """(num_tokens, H)"""
    return np.array(model.encode_media(arrays_of(media), media.grid, media.kind))[0]


def hf_inputs(made):
    import torch

    if not made.media:
        return {}
    pixels = np.stack([normalised(m).transpose(2, 0, 1) for m in made.media])
    return {"pixel_values": torch.tensor(pixels[None])}


def hf_logits(reference, made, output=()):
    import torch

    with torch.no_grad():
        tokens = torch.tensor([[*made.tokens, *output]])
        return reference(input_ids=tokens, use_cache=False, **hf_inputs(made)).logits[0].numpy()
