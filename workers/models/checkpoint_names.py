"""The names of tensors in checkpoints of models with encoders: transformers 4 and 5, and MLX's."""

from __future__ import annotations

from collections.abc import Sequence


def canonical_name(name: str, encoders: Sequence[str]) -> str:
    """`model.language_model.layers...` -> `language_model.model.layers...`; encoders' names without `model.`.

    Args:
        encoders: the first part of the names of encoders and projectors.
    """
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    bare = name.removeprefix("model.")
    return bare if bare.startswith(tuple(f"{part}." for part in ("language_model", *encoders))) else name
