"""Which architectures Tandem defines itself, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from workers.models import decoder
from workers.models.gemma import gemma3n
from workers.models.gemma.config import GEMMA3_TYPES, GEMMA4_TYPES, GemmaConfig
from workers.models.gemma.model import Gemma, MultimodalConfig
from workers.models.gemma.text import TextDecoder
from workers.models.idefics3.config import MODEL_TYPES as IDEFICS3_TYPES
from workers.models.idefics3.config import Idefics3Config
from workers.models.idefics3.model import Idefics3
from workers.models.lfm2_vl import model as lfm2_vl
from workers.models.lfm2_vl.config import MODEL_TYPES as LFM2_VL_TYPES
from workers.models.lfm2_vl.config import Lfm2VlConfig
from workers.models.minicpm_v import model as minicpm_v
from workers.models.minicpm_v.config import MODEL_TYPES as MINICPM_V_TYPES
from workers.models.minicpm_v.config import MiniCpmVConfig
from workers.models.mistral3 import config as mistral3
from workers.models.mistral3.config import Mistral3Config
from workers.models.mistral3.model import Mistral3
from workers.models.mlxlm import MlxLmModel, adapted
from workers.models.qwen import added_vision
from workers.models.qwen import model as qwen
from workers.models.qwen.config import MODEL_TYPES as QWEN_TYPES
from workers.models.qwen.config import AddedVisionConfig, QwenConfig


@dataclass(frozen=True)
class Own:
    """A model's class and how its configuration is read, from config.json and the longest sequence to be served."""

    model: type[nn.Module]
    read_config: Callable[[dict[str, Any], int], Any]


OWN = {
    **{name: Own(decoder.Model, decoder.DecoderConfig.from_hf) for name in decoder.MODEL_TYPES},
    **{
        name: Own(TextDecoder, GemmaConfig.from_hf) if name.endswith("_text") else Own(Gemma, MultimodalConfig.from_hf)
        for name in (*GEMMA3_TYPES, *GEMMA4_TYPES)
    },
    **{name: Own(qwen.QwenVL, QwenConfig.from_hf) for name in QWEN_TYPES},
    **{name: Own(Mistral3, Mistral3Config.from_hf) for name in mistral3.MODEL_TYPES},
    **{name: Own(Idefics3, Idefics3Config.from_hf) for name in IDEFICS3_TYPES},
}


def own_of(config: dict[str, Any]) -> Own | None:
    """Our definition of the model that a config.json describes; None: mlx-lm defines it, or nobody."""
    name = config["model_type"]
    if name in mistral3.MODEL_TYPES and not mistral3.is_defined(config):
        return None
    return OWN.get(name)


def _with_vision(name: str) -> Own:
    model, args = added_vision.CLASSES[name]
    return Own(model, lambda config, length: AddedVisionConfig.from_hf(config, length, args.from_dict))


# mlx-lm's text decoder with encoders of ours beside it.
WITH_ENCODERS = {
    **{name: _with_vision(name) for name in added_vision.CLASSES},
    **{name: Own(gemma3n.Gemma3n, gemma3n.Gemma3nConfig.from_hf) for name in gemma3n.MODEL_TYPES},
    **{name: Own(lfm2_vl.Lfm2Vl, Lfm2VlConfig.from_hf) for name in LFM2_VL_TYPES},
    **{name: Own(minicpm_v.MiniCpmV, MiniCpmVConfig.from_hf) for name in MINICPM_V_TYPES},
}


def adapted_to_caches(model: nn.Module, architecture: str) -> MlxLmModel:
    """Around a model that is not our own, with its encoders if it holds any.

    Raises:
        BadModel: as `MlxLmModel`.
    """
    if isinstance(model, gemma3n.Gemma3n):
        return gemma3n.ReadyGemma3n(model, architecture)
    if isinstance(model, lfm2_vl.Lfm2Vl):
        return lfm2_vl.ReadyLfm2Vl(model, architecture)
    if isinstance(model, minicpm_v.MiniCpmV):
        return minicpm_v.ReadyMiniCpmV(model, architecture)
    if architecture in WITH_ENCODERS and "vision_tower" in model:
        return added_vision.AddedVision(model, architecture)
    return adapted(model, architecture)


def is_own(model: nn.Module) -> bool:
    return any(type(model) is own.model for own in OWN.values())
