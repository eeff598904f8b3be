"""Whether a model's files can be served, by the checks that loading makes, without reading a weight."""

from __future__ import annotations

from typing import Any

import msgspec

from shared import tokenizer
from shared.errors import BadModel
from shared.gguf_file import read_header
from shared.model_files import ModelFiles
from workers.drafters.checkpoint import detect
from workers.load import folder as folders
from workers.load.gguf import read_config as read_gguf_config
from workers.models.mlxlm import adapted
from workers.models.own import WITH_ENCODERS, adapted_to_caches, own_of
from workers.safetensors import check_safetensors


class Finding(msgspec.Struct, frozen=True):
    """What a checkpoint is. `drafter` is its kind where it only drafts; `refusal` is None where it can be served."""

    architecture: str
    drafter: str | None = None
    refusal: str | None = None


def examine(files: ModelFiles) -> Finding:
    """Look at configuration, names and headers; a model of mlx-lm is built, but none of its arrays is computed."""
    architecture = "unknown"
    try:
        architecture = read_architecture(files)
        drafter = _drafter(files)
        if drafter is not None:
            return Finding(architecture, drafter=drafter)
        _check(files)
    except (BadModel, OSError) as error:
        return Finding(architecture, refusal=" ".join(str(error).split()))
    return Finding(architecture)


def read_architecture(files: ModelFiles) -> str:
    """As the checkpoint names it. Raises BadModel, OSError: it cannot be read."""
    if files.gguf is not None:
        return str(read_header(files.gguf)[0].get("general.architecture", "unknown"))
    assert files.folder is not None, "a model is a folder or a GGUF file"
    return str(folders.read_config(files.folder)["model_type"])


def read_config(files: ModelFiles) -> dict[str, Any]:
    """config.json, or what stands for it in a GGUF file. Raises BadModel, OSError: it cannot be read."""
    if files.gguf is not None:
        metadata, tensors = read_header(files.gguf)
        return read_gguf_config(metadata, {tensor.name for tensor in tensors})
    assert files.folder is not None, "a model is a folder or a GGUF file"
    return folders.read_config(files.folder)


def _drafter(files: ModelFiles) -> str | None:
    """The kind of a checkpoint that is of no use alone."""
    if files.folder is None:
        return None
    try:
        kind = detect(files.folder).kind
    except BadModel:
        return None  # no drafter; what it is else, the checks of a model tell
    return None if kind == "model" else kind


def _check(files: ModelFiles) -> None:
    """Raises BadModel with the reason that loading would give."""
    if files.gguf is not None:
        metadata, tensors = read_header(files.gguf)
        read_gguf_config(metadata, {tensor.name for tensor in tensors})
    elif files.folder is not None:
        config = folders.read_config(files.folder)
        for path in folders.weight_files(files.folder):
            check_safetensors(path)
        name = config["model_type"]
        try:
            if (own := own_of(config)) is not None:
                own.read_config(config, 0)
            elif name in WITH_ENCODERS:
                own = WITH_ENCODERS[name]
                adapted_to_caches(own.model(own.read_config(config, 0)), name)
            else:
                model, arguments = folders.mlx_lm_classes(config)
                adapted(model(arguments.from_dict(config)), name)
        except BadModel:
            raise
        except Exception as error:  # a hostile or odd configuration can fail anywhere in a model's constructor
            raise BadModel(f"{name}: {error}") from error
    tokenizer.load(files)
