"""Names, shapes and arrays of a drafter's safetensors files, under one set of names.

The names used here: `fc`, `hidden_norm`, `input_norm`, `norm`, `layers.{i}.*`, `embed_tokens`, `lm_head`,
`d2t`, `pre_fc_norm_embedding`, `pre_fc_norm_hidden`. An original EAGLE-3 file calls its layer `midlayer`; some files
prefix everything with `model.`; an MTP head lies under `mtp.`, often inside the target's own files.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from shared.errors import BadModel

MAX_HEADER_BYTES = 256 * 1024 * 1024
_MTP = re.compile(r"^(?:.*\.)?mtp\.(?=.)")
_UNUSED = re.compile(r"^(verifier_|t2d$|.*rotary_emb\.inv_freq$)")


class TensorIndex:
    """The headers of every safetensors file of a folder; no weight is read.

    Attributes:
        shapes: stored name -> shape.
        is_mlx: every file says that MLX wrote it; MLX conversions store zero-centred norms with the 1 added.
    """

    def __init__(self, folder: Path) -> None:
        """Raises BadModel: no safetensors file, or one that cannot be read."""
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise BadModel(f"drafter folder {folder} holds no .safetensors file")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.is_mlx = True
        for file in self.files:
            header = _read_header(file)
            self.is_mlx &= (header.pop("__metadata__", None) or {}).get("format") == "mlx"
            self.shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})

    def has_mtp(self) -> bool:
        return any(_MTP.match(name) for name in self.shapes)

    def has_base_model(self) -> bool:
        """Whether the folder holds a whole language model, perhaps beside an MTP head."""
        return any(re.search(r"(^|\.)layers\.\d+\.", n) and not _MTP.match(n) for n in self.shapes) and any(
            n.endswith("embed_tokens.weight") and not _MTP.match(n) for n in self.shapes
        )

    def normalised(self, kind: str) -> dict[str, str]:
        """Our name -> stored name, for the tensors that a drafter of this kind uses."""
        names: dict[str, str] = {}
        for stored in self.shapes:
            if kind == "mtp":
                name, num_matches = _MTP.subn("", stored)
                if not num_matches:
                    continue
            else:
                name = stored.removeprefix("model.")
                name = re.sub(r"^midlayer\.", "layers.0.", name)
            if not _UNUSED.match(name):
                names[name] = stored
        return names


def load_arrays(
    folder: Path, kind: str, dtype: mx.Dtype, quantization: Mapping[str, Any] | None, prefixes: tuple[str, ...] = ("",)
) -> dict[str, mx.array]:
    """The drafter's arrays under our names, dequantised and in `dtype` (integer tables keep theirs).

    Args:
        prefixes: only names that start with one of them are read.
    """
    index = TensorIndex(folder)
    names = index.normalised(kind)
    wanted = {v: k for k, v in names.items() if k.startswith(prefixes)}
    arrays: dict[str, mx.array] = {}
    for file in index.files:
        loaded = mx.load(str(file))  # lazy: an array that nobody uses is never read
        assert isinstance(loaded, dict), "a safetensors file loads as a dict"
        for stored, array in loaded.items():
            if stored in wanted:
                arrays[wanted[stored]] = array
    for name in [n for n in arrays if n.endswith(".scales")]:
        stem = name.removesuffix(".scales")
        scales, biases = arrays.pop(name), arrays.pop(stem + ".biases", None)
        settings = _quantization_of(stem, names[name].removesuffix(".scales"), quantization)
        if biases is None or settings.get("mode", "affine") != "affine":
            raise BadModel(f"drafter tensor {stem} is quantised in a way that is not supported: {settings}")
        try:
            arrays[stem + ".weight"] = mx.dequantize(
                arrays[stem + ".weight"], scales, biases, int(settings["group_size"]), int(settings["bits"])
            )
        except (KeyError, ValueError) as error:
            raise BadModel(f"drafter tensor {stem} does not fit its quantisation {settings}: {error}") from error
    return {k: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in arrays.items()}


def read_quantization(folder: Path) -> Mapping[str, Any] | None:
    """`quantization` of a drafter's config.json, as `load_arrays` takes it."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    found = raw.get("quantization")
    return found if isinstance(found, Mapping) else None


def _quantization_of(stem: str, stored: str, quantization: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Settings of one module: its own, under our name for it or the file's, or those of all."""
    if not quantization:
        raise BadModel(f"drafter tensor {stem} is quantised, but config.json has no `quantization`")
    own = next((quantization[name] for name in (stored, stem, "model." + stem) if name in quantization), None)
    return own if isinstance(own, Mapping) else quantization


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > MAX_HEADER_BYTES:
                raise BadModel(f"{file} has a header of {size} bytes; it is not a safetensors file")
            header = json.loads(stream.read(size))
    except (OSError, struct.error, ValueError) as error:
        raise BadModel(f"cannot read {file}: {error}") from error
    if not isinstance(header, dict):
        raise BadModel(f"{file} has a header that is not an object")
    return header
