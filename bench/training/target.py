"""The frozen target: its taps, its final hidden rows, its embedding and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from shared.config import Settings, load
from shared.errors import BadModel
from shared.model_files import ModelFiles, resolve
from workers.features import install_taps
from workers.load import loader
from workers.models import decoder


@dataclass(frozen=True)
class Shape:
    """Sizes that a drafter takes from its target."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner_size: int
    vocab_size: int
    num_target_layers: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From a config.json, or what a GGUF file tells under the same names.

        Raises:
            BadModel: rope scaling, which the training forward does not compute.
        """
        scaling = config.get("rope_scaling") or {}
        rope = config.get("rope_parameters") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type") or "default"
        if kind != "default":
            raise BadModel(f"training a drafter for a target with {kind!r} rope scaling is not supported")
        heads = int(config["num_attention_heads"])
        return cls(
            hidden_size=int(config["hidden_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            inner_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            num_target_layers=int(config["num_hidden_layers"]),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            max_positions=int(config.get("max_position_embeddings") or 0),
        )


class Target:
    """Args:
    taps: zero-based blocks whose output `forward` returns.
    """

    def __init__(self, model: decoder.Model, config: dict[str, Any], name: str, taps: Sequence[int] = ()) -> None:
        self.model = model
        self.config = config
        self.name = name
        self.shape = Shape.of(config)
        # Read before taps are installed: a tapped block hides its parameters.
        self.weights: dict[str, mx.array] = _layer_weights(model)
        self.embedding: mx.array = model.model.embed_tokens.weight
        self.head: mx.array = self.embedding if model.config.is_tied else model.lm_head.weight
        self.final_norm: mx.array = model.model.norm.weight
        self.taps: tuple[int, ...] = ()
        self._sinks: list[dict[int, mx.array]] = []
        self.tap(taps)

    @property
    def dtype(self) -> mx.Dtype:
        return self.embedding.dtype

    def tap(self, taps: Sequence[int]) -> None:
        """Capture these blocks, too."""
        new = sorted(set(taps) - set(self.taps))
        if new:
            self._sinks.append(install_taps(self.model, new))
            self.taps = tuple(sorted({*self.taps, *new}))

    def forward(self, tokens: mx.array) -> tuple[dict[int, mx.array], mx.array]:
        """tokens (B, L), right-padded -> ({tap: (B, L, H)}, final hidden rows (B, L, H)); no gradient flows back."""
        final = self.model.hidden(tokens)
        rows = {tap: mx.stop_gradient(sink[tap]) for sink in self._sinks for tap in sink}
        return rows, mx.stop_gradient(final)


def load_target(name: str, taps: Sequence[int] = (), dtype: str = "auto", settings: Settings | None = None) -> Target:
    """The target that a server would load for `name`.

    Raises:
        BadModel: it cannot be read, or is not one of the project's own decoders.
    """
    settings = load() if settings is None else settings
    files: ModelFiles = resolve(name, settings)
    loaded = loader.load(files, dtype)
    if not isinstance(loaded.model, decoder.Model):
        raise BadModel(f"training for {loaded.architecture} is not supported: {', '.join(decoder.MODEL_TYPES)} are")
    return Target(loaded.model, loaded.config, loaded.name, taps)


def _layer_weights(model: decoder.Model) -> dict[str, mx.array]:
    """`model.layers.i.*` of the checkpoint, split again where loading has joined q, k and v."""
    from mlx.utils import tree_flatten

    found: dict[str, mx.array] = {}
    c = model.config
    sizes = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
    for name, array in tree_flatten(model.model.parameters()):
        if name.endswith("self_attn.qkv_proj.weight"):
            stem = name.removesuffix("qkv_proj.weight")
            for part, rows in zip("qkv", mx.split(array, sizes, axis=0), strict=True):
                found[f"{stem}{part}_proj.weight"] = rows
        else:
            found[name] = array
    return found
