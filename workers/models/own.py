"""Which architectures Tandem defines itself, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from workers.models import decoder
from workers.models.gemma.config import GEMMA3_TYPES, GEMMA4_TYPES, GemmaConfig
from workers.models.gemma.model import Gemma, MultimodalConfig
from workers.models.gemma.text import TextDecoder
from workers.models.qwen import model as qwen
from workers.models.qwen.config import MODEL_TYPES as QWEN_TYPES
from workers.models.qwen.config import QwenConfig


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
}


def is_own(model: nn.Module) -> bool:
    return any(type(model) is own.model for own in OWN.values())
