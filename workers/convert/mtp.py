"""The MTP head of a checkpoint as a drafter of its own, for conversions that lost it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from shared.errors import BadModel
from workers.drafters.checkpoint import detect
from workers.drafters.tensors import TensorIndex
from workers.load.folder import read_config
from workers.safetensors import check_safetensors


def split_mtp(source: Path, target: Path) -> int:
    """Write the head of the checkpoint in the folder `source` to the empty folder `target`; its bytes.

    Tensors keep their names, types and packing, and the file says like its source who wrote it: a stored norm of an
    original Qwen3.5 checkpoint is its factor less 1, one that MLX wrote is the factor.

    Raises:
        BadModel: the source cannot be read, has no head, or one that could not be used.
    """
    config = read_config(source)
    index = TensorIndex(source)
    if not index.has_mtp():
        mend = "name the original checkpoint, since conversions often leave them out"
        raise BadModel(f"{source.name} has no `mtp.*` tensors: {mend}")
    detect(source, kind="mtp")  # refuses what the drafter could not run
    for path in index.files:
        check_safetensors(path)
    wanted = set(index.normalised("mtp").values())
    head: dict[str, mx.array] = {}
    for path in index.files:
        loaded = mx.load(str(path))  # lazy: only the head's arrays are read
        assert isinstance(loaded, dict), "a safetensors file loads as a dict"
        head |= {name: array for name, array in loaded.items() if name in wanted}
    mx.save_safetensors(str(target / "model.safetensors"), head, {"format": "mlx" if index.is_mlx else "pt"})
    body = config.get("text_config") or config
    made = {key: value for key, value in body.items() if key not in ("architectures", "model_type", "quantization")}
    made |= {"architectures": ["Qwen3_5MTP"], "model_type": "qwen3_5_mtp"}
    if "quantization" in config:
        made["quantization"] = config["quantization"]
    (target / "config.json").write_text(json.dumps(made, indent=2) + "\n")
    return sum(array.nbytes for array in head.values())
