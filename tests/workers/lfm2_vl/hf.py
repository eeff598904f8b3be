"""transformers' LFM2-VL models, tiny and random, prompts with images for both sides, and the image processor."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import hashlib
import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import msgspec
import numpy as np

from frontend.media.processors.lfm2_vl import Lfm2VlProcessor
from shared.messages import MediaItem, MediaTensor
from shared.model_files import ModelFiles
from tests.support.media_oracle import Prompt, arrays_of, normalised
from workers.load import load

VOCAB, HIDDEN = 96, 32
IMAGE, START, END = 90, 91, 92
PATCH = 4
MEAN, STD = (0.5, 0.45, 0.4), (0.5, 0.25, 0.3)
TEXT = {
    "model_type": "lfm2", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "norm_eps": 1e-5,
    "block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}  # fmt: skip
VISION = {
    "model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "patch_size": PATCH, "num_patches": 25, "vision_use_head": False,
}  # fmt: skip
MORE = {"image_token_id": IMAGE, "projector_hidden_size": 40, "downsample_factor": 2}
# The frontend's settings, in which tiny pictures are large ones.
SIZES = {
    "encoder_patch_size": PATCH, "downsample_factor": 2, "tile_size": 16, "min_image_tokens": 2, "max_image_tokens": 8,
    "image_mean": list(MEAN), "image_std": list(STD),
}  # fmt: skip


def make(transformers, folder, text=None, vision=None, seed=0, scale=0.1, **more):
    """transformers' model and ours with the same weights."""
    import torch

    config = transformers.Lfm2VlConfig(
        text_config={**TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})}, **{**MORE, **more}
    )
    torch.manual_seed(seed)
    reference = transformers.Lfm2VlForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter + scale * torch.randn(parameter.shape))
    reference = reference.eval()
    reference.save_pretrained(folder)
    return reference, loaded(folder)


def loaded(folder, dtype="float32"):
    return load(ModelFiles(name="m", folder=folder), dtype).model


def image(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def item(pixels, merge_size=2):
    """Pixels (height, width, 3) as the frontend would send them, not placed yet."""
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    arrays = {"pixels": pixels, "mean": np.array(MEAN, np.float32), "std": np.array(STD, np.float32)}
    tensors = [
        MediaTensor(name=name, dtype=str(a.dtype), shape=list(a.shape), data=a.tobytes()) for name, a in arrays.items()
    ]
    return MediaItem(
        kind="image", start=0, num_tokens=rows * columns // merge_size**2, grid=[1, rows, columns],
        content_hash=hashlib.sha256(pixels.tobytes()).digest(), tensors=tensors,
    )  # fmt: skip


def prompt(pieces):
    """From token lists and unplaced items."""
    tokens, media = [], []
    for piece in pieces:
        if isinstance(piece, list):
            tokens += piece
            continue
        tokens.append(START)
        media.append(msgspec.structs.replace(piece, start=len(tokens)))
        tokens += [IMAGE] * piece.num_tokens + [END]
    return Prompt(tokens, media)


def hf_inputs(media):
    """Patches of all items, padded to the longest as transformers' image processor pads."""
    import torch

    if not media:
        return {}
    cut = []
    for part in media:
        pixels = normalised(part)
        rows, columns = part.grid[1:]
        patches = [
            pixels[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].reshape(-1)
            for r in range(rows)
            for c in range(columns)
        ]
        cut.append(np.stack(patches))
    longest = max(map(len, cut))
    values = torch.zeros((len(cut), longest, cut[0].shape[1]))
    mask = torch.zeros((len(cut), longest), dtype=torch.int32)
    for i, rows in enumerate(cut):
        values[i, : len(rows)] = torch.tensor(rows)
        mask[i, : len(rows)] = 1
    shapes = torch.tensor([m.grid[1:] for m in media])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


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


def encoded(model, media):
    return np.array(model.encode_media(arrays_of(media), media.grid, "image")[0])


def processor(**changes):
    """The frontend's, with settings that suit tiny images."""
    return Lfm2VlProcessor(
        patch_size=PATCH, merge_size=2, tile_size=16, min_tokens=2, max_tokens=8, mean=MEAN, std=STD,
        image_token_id=IMAGE, **changes,
    )  # fmt: skip


def image_processor(transformers, **settings):
    """transformers', which needs torchvision for two functions. Where that is missing they are PyTorch's, which
    torchvision calls: for pixels of 8 bits, or on other CPUs for floats that it rounds.
    """
    from transformers import image_processing_backends as backends

    name = "transformers.models.lfm2_vl.image_processing_lfm2_vl"
    if importlib.util.find_spec("torchvision") is None and name not in sys.modules:
        modes = SimpleNamespace(LANCZOS="lanczos", BILINEAR="bilinear", BICUBIC="bicubic")
        functional = SimpleNamespace(resize=_resize, normalize=_normalize, InterpolationMode=modes)
        stands = {
            "torchvision": ModuleType("torchvision"), "torchvision.transforms": ModuleType("transforms"),
            "torchvision.transforms.v2": SimpleNamespace(functional=functional),
        }  # fmt: skip
        sys.modules.update(stands)
        try:
            importlib.import_module(name)
        finally:
            for stand in stands:
                del sys.modules[stand]
        backends.tvF = functional
        backends.pil_torch_interpolation_mapping = {2: "bilinear", 3: "bicubic"}
    return importlib.import_module(name).Lfm2VlImageProcessor(**settings)


def _resize(pixels, size, interpolation, antialias):
    from torch.nn import functional

    return functional.interpolate(pixels, size, mode=interpolation, antialias=antialias)


def _normalize(pixels, mean, std, inplace):
    return (pixels - mean[:, None, None]) / std[:, None, None]
