"""transformers' MiniCPM-V 4.6, tiny and random, its processor, and prompts with images for both sides."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import importlib
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from frontend.media.loader import Loaded, MediaLoader, make_item
from frontend.media.parts import MediaPart
from frontend.media.processors import minicpm_v
from shared.config import Settings
from shared.model_files import ModelFiles
from tests.support.media_oracle import Prompt, arrays_of, normalised, pair
from workers.load import load

MARKS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip


def make_tokenizer():
    """Every byte is a token, beside MiniCPM-V's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", *MARKS.values()]
    made.add_special_tokens([AddedToken(name, special=True) for name in special])
    return made


TOKENIZER = make_tokenizer()
VOCAB = TOKENIZER.get_vocab_size()
IMAGE, VIDEO = (TOKENIZER.token_to_id(MARKS[name]) for name in ("image_token", "video_token"))
PATCH, HIDDEN = 4, 32
TEXT = {
    "model_type": "qwen3_5_text", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "full_attention_interval": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 20,
    "patch_size": PATCH,
}  # fmt: skip
MORE = {"image_token_id": IMAGE, "video_token_id": VIDEO, "insert_layer_id": 1, "tie_word_embeddings": True}
# Of the image processor: tiny pictures are large ones.
IMAGES = {
    "patch_size": PATCH, "scale_resolution": 32, "max_slice_nums": 4, "image_mean": [0.5, 0.45, 0.4],
    "image_std": [0.5, 0.25, 0.3],
}  # fmt: skip


def make(transformers, folder, text=None, vision=None, seed=0, scale=0.1, **more):
    """transformers' model and ours with the same weights."""
    config = {"text_config": {**TEXT, **(text or {})}, "vision_config": {**VISION, **(vision or {})}, **MORE, **more}
    return pair(transformers, folder, "minicpmv4_6", config, seed, scale)


def loaded(folder, dtype="float32"):
    return load(ModelFiles(name="m", folder=folder), dtype).model


def picture(width, height, seed=0):
    """With large and small structures, so that a filter shows."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + seed), np.cos(y / 5 + seed), np.sin(x * y / 90 + seed)], axis=-1) * 90
    noise = np.random.default_rng(seed).integers(-30, 30, (height, width, 3))
    return Image.fromarray((128 + waves + noise).clip(0, 255).astype(np.uint8))


def processor(settings=None, vision=None, **config):
    """The frontend's, for a model of `make`."""
    given = {"vision_config": {**VISION, **(vision or {})}, **MORE, **config}
    return minicpm_v.from_configs(given, {**IMAGES, **(settings or {})}, TOKENIZER.token_to_id)


def hf_images(**settings):
    """transformers' image processor with Pillow."""
    name = "transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6"
    return importlib.import_module(name).MiniCPMV4_6ImageProcessorPil(**{**IMAGES, **settings})


def hf_processor(transformers, **settings):
    """transformers', without the check of its parts' classes: the one for videos needs torchvision."""
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor

    class Unchecked(MiniCPMV4_6Processor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, pad_token="<|im_end|>", extra_special_tokens=MARKS
    )
    videos = SimpleNamespace(slice_mode=True, downsample_mode="16x")
    return Unchecked(hf_images(**settings), videos, tokenizer)


def prompt(made, text, pictures=()):
    """A rendered text with its pictures in the places of `<|image_pad|>`, as the frontend makes it."""
    parts = [made.tiles(one) for one in pictures]
    part = MediaPart(kind="image", param="p")
    loaded = Loaded([make_item(part, x) for those in parts for x in those], [[x.lead for x in p] for p in parts])
    loader = MediaLoader(made, Settings())
    text = text.replace("@", MARKS["image_token"])
    ids = TOKENIZER.encode(loader.rewrite(text, loaded), add_special_tokens=False).ids
    return Prompt(*loader.place(ids, loaded))


def encoded(model, media):
    """(num_tokens, H)"""
    return np.array(model.encode_media(arrays_of(media), media.grid, "image")[0])


def packed(media):
    """(channels, size, patches * size): an item's patches side by side, as transformers' encoder has them."""
    pixels = normalised(media)
    _, rows, columns = media.grid
    cut = pixels.transpose(2, 0, 1).reshape(3, rows, PATCH, columns, PATCH)
    return cut.transpose(0, 2, 1, 3, 4).reshape(3, PATCH, -1)


def hf_inputs(media):
    import torch

    if not media:
        return {}
    values = np.concatenate([packed(part) for part in media], axis=-1)[None]
    return {"pixel_values": torch.tensor(values), "target_sizes": torch.tensor([part.grid[1:] for part in media])}


def hf_features(reference, media):
    import torch

    with torch.no_grad():
        output = reference.model.get_image_features(**hf_inputs(media), return_dict=True)
    return [rows.numpy() for rows in output.pooler_output]


def hf_logits(reference, made, output=()):
    import torch

    with torch.no_grad():
        tokens = torch.tensor([[*made.tokens, *output]])
        return reference(tokens, use_cache=False, **hf_inputs(made.media)).logits[0].numpy()
