"""A tiny Qwen3 embedding checkpoint with random weights, in the form of sentence-transformers, and its oracle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import tiny_model


def write(folder: Path, mode: str = "lasttoken") -> Path:
    """The bare decoder's weights, a tokenizer and `1_Pooling`; `mode` is sentence-transformers' name."""
    import torch
    import transformers

    tiny_model.write(folder)  # for its tokenizer and template
    tokenizer = tiny_model._tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, rope_theta=10000.0,
        tie_word_embeddings=True, initializer_range=0.3, eos_token_id=tokenizer.token_to_id("<|end|>"),
    )  # fmt: skip
    transformers.Qwen3Model(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ]
        )
    )
    return folder


class Oracle:
    """transformers' hidden rows, pooled by the definition."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self._model: Any = transformers.Qwen3Model.from_pretrained(folder, dtype="float32").eval()

    def vector(self, token_ids: Sequence[int], kind: str) -> np.ndarray:
        """(H,), not scaled."""
        import torch

        with torch.no_grad():
            rows: np.ndarray = self._model(torch.tensor([list(token_ids)])).last_hidden_state[0].numpy()
        vector: np.ndarray = rows[-1] if kind == "last" else rows.mean(axis=0)
        return vector
