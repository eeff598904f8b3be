"""Gemma 4's assistant: a few decoder layers that make queries only and read two of the target's own layers.

Each step reads the embedding of the last token and a hidden row, and puts out the next token's logits and the next
hidden row. Keys and values are those of the target's last sliding and last full layer that write any; they cover the
positions before the anchor, and the drafter's own position stays the anchor's for all tokens of a draft. This is the
model alone; `assistant.py` drafts with it.

Source: transformers' gemma4_assistant (definition and tensor names).
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel
from workers.drafters.tensors import load_arrays
from workers.models.base import LayerCache
from workers.models.gemma.config import GemmaConfig
from workers.models.gemma.text import Layer, make_norm
from workers.models.rope import Rope

_BESIDE_MODEL = ("pre_projection.", "post_projection.", "masked_embedding.")
MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclasses.dataclass(frozen=True)
class AssistantConfig:
    text: GemmaConfig  # its window counts the rows before the anchor: the reference's is inclusive, so one more
    backbone_size: int  # width of the target
    num_centroids: int  # 0: the head scores every token
    num_chosen: int  # centroids whose tokens are scored

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> AssistantConfig:
        """Read a config.json.

        Raises:
            BadModel: not an assistant, or one with what assistants do not have.
        """
        model_type = str(config.get("model_type"))
        if model_type not in MODEL_TYPES:
            raise BadModel(f"{model_type!r} is no Gemma 4 assistant")
        text = dict(config.get("text_config") or {})
        if not text:
            raise BadModel(f"{model_type}: the configuration has no text_config")
        if text.get("hidden_size_per_layer_input") or text.get("enable_moe_block") or text.get("attention_bias"):
            raise BadModel(f"{model_type}: per-layer embeddings, experts and biases are not supported")
        # All layers read another model's keys, which the decoder's configuration has no word for.
        read = GemmaConfig.from_hf({**text, "model_type": "gemma4_text", "num_kv_shared_layers": 0}, 0)
        layers = tuple(dataclasses.replace(shape, source=i) for i, shape in enumerate(read.layers))
        has_centroids = bool(config.get("use_ordered_embeddings"))
        made = cls(
            text=dataclasses.replace(read, layers=layers, window=read.window + 1),
            backbone_size=int(config.get("backbone_hidden_size") or 1536),
            num_centroids=int(config.get("num_centroids") or 2048) if has_centroids else 0,
            num_chosen=int(config.get("centroid_intermediate_top_k") or 32),
        )
        if has_centroids and (read.vocab_size % made.num_centroids or made.num_chosen > made.num_centroids):
            raise BadModel(f"{model_type}: {read.vocab_size} tokens in {made.num_centroids} clusters")
        return made


class CentroidHead(nn.Module):
    """Scores clusters of tokens first, then the tokens of the best clusters."""

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        self.num_chosen, self.num_centroids = config.num_chosen, config.num_centroids
        self.centroids = nn.Linear(config.text.hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((config.text.vocab_size,), mx.int32)

    def __call__(self, hidden: mx.array, embedding: nn.Embedding) -> mx.array:
        """(B, H) -> (B, V); tokens outside the chosen clusters get one less than the least of the scores."""
        scores = self.centroids(hidden)
        chosen = mx.argpartition(scores, kth=-self.num_chosen, axis=-1)[:, -self.num_chosen :]
        tokens = self.token_ordering.reshape(self.num_centroids, -1)[chosen].flatten(1)
        logits = (embedding(tokens) @ hidden[..., None]).squeeze(-1)
        others = mx.broadcast_to(logits.min() - 1.0, (hidden.shape[0], self.token_ordering.size))
        return mx.put_along_axis(others, tokens, logits, axis=-1)


class Body(nn.Module):
    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, shape) for shape in config.layers]
        self.norm = make_norm(config, config.hidden_size)


class Gemma4Assistant(nn.Module):
    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config.text)
        self.pre_projection = nn.Linear(2 * config.backbone_size, config.text.hidden_size, bias=False)
        self.post_projection = nn.Linear(config.text.hidden_size, config.backbone_size, bias=False)
        if config.num_centroids:
            self.masked_embedding = CentroidHead(config)
        self._ropes = {kind: Rope(parameters) for kind, parameters in config.text.ropes.items()}
        self._is_cpu = mx.default_device().type == mx.DeviceType.cpu

    def __call__(
        self, embeddings: mx.array, hidden: mx.array, caches: Mapping[str, LayerCache], positions: mx.array
    ) -> tuple[mx.array, mx.array]:
        """One token for each sequence of a batch.

        Args:
            embeddings: (B, backbone_size) of the last tokens, with the target's scale.
            hidden: (B, backbone_size), the target's row after its final norm that predicted the anchor; later what
                this returned.
            caches: by layer kind, the target's rows before each anchor; their last one is where they attend from.
            positions: (B,) of the anchors, the same for every token of a draft.
        Returns:
            logits (B, V), and the next step's `hidden`.
        """
        x = self.pre_projection(mx.concatenate([embeddings, hidden], axis=-1))[:, None]
        rotations = {kind: rope.at(positions, 1, x.shape[0], self._is_cpu) for kind, rope in self._ropes.items()}
        for layer, shape in zip(self.model.layers, self.config.text.layers, strict=True):
            x = layer(x, rotations[shape.kind], caches[shape.kind])
        out = self.model.norm(x)[:, 0]
        if self.config.num_centroids:
            logits = self.masked_embedding(out, self.model.embed_tokens)
        else:
            logits = self.model.embed_tokens.as_linear(out)
        return logits, self.post_projection(out)


def load_assistant(folder: Path, dtype: mx.Dtype) -> Gemma4Assistant:
    """The model with its weights read; those of an MLX-quantised checkpoint are dequantised.

    Raises:
        BadModel: not an assistant, or tensors that do not fit its configuration.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel(f"{folder} cannot be read: {error}") from error
    model = Gemma4Assistant(AssistantConfig.from_hf(config))
    arrays = load_arrays(folder, "assistant", dtype, config.get("quantization"))
    kept = {
        name if name.startswith(_BESIDE_MODEL) else f"model.{name}": array
        for name, array in arrays.items()
        if not name.startswith("lm_head.")  # tied
    }
    try:
        model.load_weights(list(kept.items()))
    except ValueError as error:
        raise BadModel(f"{folder}: {str(error)[:300]}") from error
    mx.eval(model.parameters())
    return model
