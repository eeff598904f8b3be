"""Gemma 3n: mlx-lm's text decoder, cut where its head begins, with encoders of our own beside it.

Tokens from `vocab_offset` on belong to an encoder's embedder: they stand around media and behind what is shorter than
the tokens that every clip takes, and are embedded there, in text too.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3n
from mlx_lm.models.base import create_attention_mask

from shared.errors import BadModel
from shared.messages import MediaKind
from workers.models.base import CausalMedia
from workers.models.gemma.mobilenet import OUTPUT_CHANNELS, MobileNetConfig, MobileNetTower
from workers.models.gemma.usm import UsmConfig, UsmTower
from workers.models.mlxlm import MlxLmModel

MODEL_TYPES = ("gemma3n",)
AUDIO_PARTS = ("audio_tower", "embed_audio")
IMAGE_PARTS = ("vision_tower", "embed_vision")
_UNUSED = ("lm_head.", "rotary_emb", ".v_norm.", "embed_scale")
MIN_SQUARE = 1e-5  # of a stream's mean square, before it is divided by


@dataclass(frozen=True)
class EmbedderConfig:
    inputs: int
    vocab_size: int
    vocab_offset: int
    rms_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], inputs: int, offset: int) -> EmbedderConfig:
        """From an encoder's configuration; `inputs` and `offset` where it does not say."""
        return cls(
            inputs=int(config.get("hidden_size") or inputs),
            vocab_size=int(config.get("vocab_size") or 128),
            vocab_offset=int(config.get("vocab_offset") or offset),
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        )


@dataclass(frozen=True)
class Gemma3nConfig:
    """`vision` and `audio` are None where the configuration tells of no encoder."""

    text: Any  # mlx-lm's TextConfig
    vision: MobileNetConfig | None
    vision_embedder: EmbedderConfig | None
    audio: UsmConfig | None
    audio_embedder: EmbedderConfig | None
    num_clip_tokens: int  # of every clip

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> Gemma3nConfig:
        """Read a config.json.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that is not computed.
        """
        try:
            text = _text_args(config)
            vision, audio = config.get("vision_config"), config.get("audio_config")
            num_tokens = int(config.get("vision_soft_tokens_per_image") or 256)
            return cls(
                text=text,
                vision=MobileNetConfig.from_hf(vision, num_tokens) if vision is not None else None,
                vision_embedder=EmbedderConfig.from_hf(vision, OUTPUT_CHANNELS, 262_144)
                if vision is not None
                else None,
                audio=UsmConfig.from_hf(audio) if audio is not None else None,
                audio_embedder=EmbedderConfig.from_hf(audio, 1536, 262_272) if audio is not None else None,
                num_clip_tokens=int(config.get("audio_soft_tokens_per_image") or 188),
            )
        except KeyError as missing:
            raise BadModel(f"gemma3n: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"gemma3n: malformed configuration: {error}") from error


def _text_args(config: dict[str, Any]) -> Any:  # noqa: ANN401 - mlx-lm's class
    """mlx-lm's TextConfig; it knows the two bases of the rotation by the names of older configurations."""
    text = {**config["text_config"]}
    if (activation := text.get("hidden_activation") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise BadModel(f"gemma3n: hidden_activation {activation!r} is not supported")
    if not text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)):
        raise BadModel("gemma3n: a head apart from the embedding is not supported")
    ropes = text.get("rope_parameters") or {}
    for kind, name in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
        rope = ropes.get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise BadModel(f"gemma3n: rope type {rope['rope_type']!r} is not supported")
        if "rope_theta" in rope:
            text[name] = rope["rope_theta"]
    if text.get("rope_scaling"):
        raise BadModel("gemma3n: rope_scaling is not supported")
    return gemma3n.TextConfig.from_dict(text)


class TextDecoder(gemma3n.LanguageModel):
    """mlx-lm's, whose head is separate."""

    def embed(self, inputs: mx.array) -> mx.array:
        return self.embed_tokens(inputs) * self.hidden_size**0.5

    def hidden(self, inputs: mx.array, cache: Sequence[Any] | None, x: mx.array) -> mx.array:
        """(B, L, H) after the final norm of embeddings x, which tokens `inputs` have per-layer embeddings of."""
        per_layer = self.project_per_layer_inputs(x, self.get_per_layer_inputs(inputs))
        caches = self.make_cache() if cache is None else cache
        masks = {
            "full_attention": create_attention_mask(x, caches[self.first_full_idx]),
            "sliding_attention": create_attention_mask(
                x, caches[self.first_sliding_idx], window_size=self.sliding_window
            ),
        }
        offset = caches[0].offset  # before a layer moves it
        streams = mx.stack([x, *(_as_loud(projection(x), x) for projection in self.altup_projections)])
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            own = caches[self.layer_idx_to_cache_idx[i]]
            streams = layer(streams, masks[kind], own, per_layer[:, :, i], offset=offset)
        first = streams[0]
        others = [
            _as_loud(projection(streams[i + 1]), first) for i, projection in enumerate(self.altup_unembed_projections)
        ]
        return self.norm(mx.stack([first, *others]).mean(axis=0))

    def logits(self, hidden: mx.array) -> mx.array:
        logits, cap = self.embed_tokens.as_linear(hidden), self.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap


def _as_loud(x: mx.array, other: mx.array) -> mx.array:
    """x with the root mean square of `other`."""
    wanted, own = (mx.mean(mx.square(rows), axis=-1, keepdims=True) for rows in (other, x))
    return x * mx.sqrt(wanted) / mx.sqrt(mx.maximum(own, MIN_SQUARE))


class MediaEmbedder(nn.Module):
    """Into the text decoder's width: an encoder's rows ("soft"), or tokens of its own ("hard")."""

    def __init__(self, config: EmbedderConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.inputs)
        self.hard_embedding_norm = nn.RMSNorm(config.inputs, config.rms_norm_eps)
        self.soft_embedding_norm = nn.RMSNorm(config.inputs, config.rms_norm_eps)
        self.embedding_projection = nn.Linear(config.inputs, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self._projected(self.soft_embedding_norm(x))

    def tokens(self) -> mx.array:
        """(vocab_size, H) of its tokens."""
        return self._projected(self.hard_embedding_norm(self.embedding(mx.arange(self.config.vocab_size))))

    def _projected(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(self.embedding_projection(x), None, self.config.rms_norm_eps)


class Body(nn.Module):
    """A module of its own because the parameter names start with `model.`."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.language_model = TextDecoder(config.text)
        if config.vision is not None and config.vision_embedder is not None:
            self.vision_tower = MobileNetTower(config.vision)
            self.embed_vision = MediaEmbedder(config.vision_embedder, config.text.hidden_size)
        if config.audio is not None and config.audio_embedder is not None:
            self.audio_tower = UsmTower(config.audio)
            self.embed_audio = MediaEmbedder(config.audio_embedder, config.text.hidden_size)


class Gemma3n(nn.Module):
    """The weights, by the names of the original checkpoints, which are mlx-lm's too."""

    def __init__(self, config: Gemma3nConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.language_model.layers

    def make_cache(self) -> list[Any]:
        return self.model.language_model.make_cache()

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Text as mlx-lm's model has it."""
        text = self.model.language_model
        return text.logits(
            text.hidden(inputs, cache, text.embed(inputs) if input_embeddings is None else input_embeddings)
        )

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drops an encoder without weights: text-only conversions keep its configuration.

        Layers with another layer's keys do not use projections of their own. Older checkpoints hold them, and mlx-lm
        wants them; newer ones do not.
        """
        bare = {
            n.removeprefix("model.").replace("language_model.model.", "language_model.", 1): w
            for n, w in weights.items()
        }
        text = {n: w for n, w in bare.items() if n.startswith("language_model.") and not any(u in n for u in _UNUSED)}
        others = {n: w for n, w in bare.items() if not n.startswith("language_model.")}
        decoder = self.model.language_model
        for i in range(decoder.first_kv_shared_layer_idx, len(decoder.layers)):
            for name in ("k_proj", "v_proj", "k_norm"):
                if f"language_model.layers.{i}.self_attn.{name}.weight" not in text:
                    decoder.layers[i].self_attn.pop(name)
        found = text | self._encoder_weights(others, IMAGE_PARTS) | self._encoder_weights(others, AUDIO_PARTS)
        return {f"model.{name}": weight for name, weight in found.items()}

    def _encoder_weights(self, weights: dict[str, mx.array], parts: tuple[str, str]) -> dict[str, mx.array]:
        tower, embedder = parts
        own = {n.removeprefix(f"{tower}."): w for n, w in weights.items() if n.startswith(f"{tower}.")}
        if not own or tower not in self.model:
            for part in parts:
                self.model.pop(part, None)
            return {}
        made = {f"{tower}.{n}": w for n, w in self.model[tower].sanitize(own).items()}
        return made | {n: w for n, w in weights.items() if n.startswith(f"{embedder}.")}


class ReadyGemma3n(CausalMedia, MlxLmModel):
    """Around a `Gemma3n`: `SplitModel` and `MediaModel`."""

    def __init__(self, model: Gemma3n, architecture: str) -> None:
        self._body: Any = model.model
        self._text: TextDecoder = self._body.language_model
        self._config = model.config
        self._tables = [
            (embedder.config.vocab_offset, embedder.tokens())
            for embedder in (self._body[part] for part in ("embed_vision", "embed_audio") if part in self._body)
        ]
        super().__init__(model, architecture)

    @property
    def modalities(self) -> list[MediaKind]:
        found: list[MediaKind] = ["image"] if "vision_tower" in self._body else []
        return [*found, "audio"] if "audio_tower" in self._body else found

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """(1, num_tokens, H) of an image's `pixels` (height, width, 3) uint8 or a clip's log-mel `frames` (T, mels)."""
        if kind == "audio":
            return self.encode_audio(tensors["frames"])[None]
        pixels = tensors["pixels"].astype(mx.float32) * (1 / 255)
        return self.encode_image((pixels - tensors["mean"]) / tensors["std"])[None]

    def encode_image(self, pixels: mx.array) -> mx.array:
        """Pixels (height, width, 3) -> (tokens, H)."""
        rows = self._body.vision_tower(pixels)
        return self._body.embed_vision(rows * OUTPUT_CHANNELS**0.5)

    def encode_audio(self, frames: mx.array) -> mx.array:
        """(num_clip_tokens, H): behind the clip's own rows stands the last token of the encoder's vocabulary."""
        rows = self._body.embed_audio(self._body.audio_tower(frames))
        count = self._config.num_clip_tokens
        assert rows.shape[0] <= count, f"{rows.shape[0]} rows of a clip for {count} tokens"
        _, tokens = self._tables[-1]
        return mx.concatenate([rows, mx.broadcast_to(tokens[-1:], (count - rows.shape[0], rows.shape[1]))])

    def embed(self, inputs: mx.array) -> mx.array:
        rows = self._text.embed(inputs)
        for offset, tokens in self._tables:
            own = tokens[mx.clip(inputs - offset, 0, tokens.shape[0] - 1)].astype(rows.dtype)
            rows = mx.where((inputs >= offset)[..., None], own, rows)
        return rows

    def hidden(
        self, inputs: mx.array, cache: Sequence[object] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self._text.hidden(inputs, cache, self.embed(inputs) if input_embeddings is None else input_embeddings)

    def logits(self, hidden: mx.array) -> mx.array:
        return self._text.logits(hidden)

    def __call__(
        self, inputs: mx.array, cache: Sequence[object] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.hidden(inputs, cache, input_embeddings))
