"""How weights are packed: MLX's modes, and mlx-lm's recipes that give some layers more bits than others.

Modes: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from msgspec import Struct

from shared.errors import BadConfig, BadModel

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# mode -> (bits, group size); those of affine are defaults, the others have no choice
MODES = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
RECIPES: tuple[str, ...] = tuple(QUANT_RECIPES)

# They stay as they are: they are small, and what they see decides about everything after it.
ENCODERS = frozenset({
    "vision_tower", "visual", "vision_model", "vision_embedder", "embed_vision", "multi_modal_projector", "connector",
    "audio_tower", "embed_audio", "merger", "vit_merger",
})  # fmt: skip


def is_encoder(path: str) -> bool:
    """Is this parameter or layer of a model part of an encoder?"""
    return path.removeprefix("model.").split(".")[0] in ENCODERS


# A wrong choice of experts costs more than its few weights.
_ROUTER = re.compile(r"\.(router\.proj|mlp\.gate)$")
_ROUTER_RULE = {"group_size": 64, "bits": 8}

Rule = Callable[[str, nn.Module], bool | dict[str, Any]]
"""(path, layer) -> whether to pack it, or how."""


class Quantization(Struct, frozen=True, kw_only=True):
    """Raises BadConfig where MLX has no such form."""

    mode: str = "affine"
    bits: int | None = None  # per weight; None: the mode's
    group_size: int | None = None  # weights of a row that share a scale; None: the mode's
    recipe: str | None = None  # of RECIPES: affine, with the bits that it says

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadConfig(f"mode {self.mode!r} is none of {', '.join(MODES)}")
        if self.recipe is not None:
            if self.recipe not in RECIPES:
                raise BadConfig(f"recipe {self.recipe!r} is none of {', '.join(RECIPES)}")
            if self.mode != "affine" or self.bits is not None:
                raise BadConfig(f"recipe {self.recipe} says the bits of each layer itself, in mode affine")
        bits, groups = MODES[self.mode]
        allowed_bits = AFFINE_BITS if self.mode == "affine" else (bits,)
        allowed_groups = AFFINE_GROUPS if self.mode == "affine" else (groups,)
        _check("bits", self.bits, allowed_bits, self.mode)
        _check("group_size", self.group_size, allowed_groups, self.mode)

    @property
    def packing(self) -> tuple[int, int]:
        """(bits, group size), of a recipe's layers the group size."""
        bits, group_size = MODES[self.mode]
        return self.bits or bits, self.group_size or group_size

    def check_mlx(self) -> None:
        """Raises BadConfig: the installed MLX does not have the mode."""
        bits, group_size = self.packing
        try:
            mx.eval(mx.quantize(mx.zeros((8, 4 * group_size)), group_size=group_size, bits=bits, mode=self.mode))
        except (ValueError, TypeError) as error:
            raise BadConfig(f"this MLX cannot pack {bits} bits in mode {self.mode}: {error}") from error


def _check(name: str, value: int | None, allowed: Sequence[int], mode: str) -> None:
    if value is not None and value not in allowed:
        raise BadConfig(f"{name} {value}: mode {mode} has {', '.join(map(str, allowed))}")


def rule_for(model: nn.Module, how: Quantization) -> Rule:
    """Which of a model's layers are packed, and how where that is not the general way.

    Raises:
        BadModel: the recipe's layers are not in this model.
    """
    own: Rule | None = getattr(model, "quant_predicate", None)  # mlx-lm's models name layers that need care
    recipe = _recipe(model, how) if how.recipe is not None else None
    _, group_size = how.packing

    def rule(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if is_encoder(path):
            return False
        chosen: bool | dict[str, Any] = _ROUTER_RULE if _ROUTER.search(path) else True
        if chosen is True and own is not None:
            chosen = own(path, layer)
        if chosen is True and recipe is not None:
            chosen = recipe(path, layer)
        groups = chosen.get("group_size", group_size) if isinstance(chosen, dict) else group_size
        return chosen if layer.weight.shape[-1] % groups == 0 else False

    return rule


class _TextLayers:
    """A model as mlx-lm's recipes look at it, without its encoders."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        inner = model
        while inner is not None and not isinstance(inner.get("layers"), list):
            inner = inner.get("language_model") or inner.get("model")
        self.layers = inner["layers"] if inner is not None else []

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return (item for item in self._model.named_modules() if not is_encoder(item[0]))


def _recipe(model: nn.Module, how: Quantization) -> Rule:
    try:
        rule: Rule = mixed_quant_predicate_builder(how.recipe, _TextLayers(model), how.packing[1])
    except ValueError as error:
        raise BadModel(f"recipe {how.recipe} does not fit this model: {error}") from error
    return rule
