"""From a draft checkpoint to what runs: the fusion for the target process, the draft engine for the drafter's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from shared.config import Settings
from shared.errors import BadModel
from shared.messages import WorkerInfo
from shared.model_files import resolve
from workers.draft_engine import DraftEngine
from workers.drafters.causal_lm import CausalLMDrafter
from workers.drafters.checkpoint import detect
from workers.drafters.config import DrafterConfig
from workers.drafters.registry import load_drafter, load_fusion
from workers.load import LoadedModel, load
from workers.machine import DTYPES, device_name, is_cpu
from workers.runner import ModelRunner

WARM_UP_BATCHES = (1, 2, 4, 8, 16, 32)


def draft_config(settings: Settings, target_config: dict[str, Any]) -> DrafterConfig | None:
    """What the draft checkpoint is; None without one (or for n-gram drafts, which need none).

    Raises:
        BadModel: it cannot be read, or is of a kind that we do not know.
    """
    if not settings.draft_checkpoint:
        return None
    files = resolve(settings.draft_model, settings)
    if files.folder is None:
        return DrafterConfig(kind="model", path=files.gguf or Path(), max_draft_tokens=settings.draft_block_size or 4)
    return detect(files.folder, target_config, settings.draft_kind or None)


def install_fusion(runner: ModelRunner, config: DrafterConfig | None, dtype: mx.Dtype) -> None:
    """Have the target keep the hidden states that this drafter needs."""
    if config is None:
        return
    fusion = load_fusion(config, dtype)
    if fusion is not None:
        runner.capture(config.taps, fusion)


def build_drafter(settings: Settings, target: LoadedModel | None = None) -> tuple[DraftEngine, WorkerInfo]:
    """Args:
        target: the one of this process, if it is here.
    Raises:
        BadModel: the checkpoint or the target's files cannot be loaded, or do not fit each other.
    """
    target = target or load(resolve(settings.model, settings), settings.dtype)
    config = draft_config(settings, target.config)
    assert config is not None, "a drafter process without a draft model"
    dtype = DTYPES[target.dtype]
    if config.kind == "model":
        model = load(resolve(settings.draft_model, settings), settings.dtype)
        _check_same_vocabulary(target, model)
        engine = DraftEngine(CausalLMDrafter(model.model, target.vocab_size), needs_features=False)
    else:
        embed, head = _tables(target, config)
        engine = DraftEngine(load_drafter(config, dtype, embed, head), config.feature != "none")
    if not is_cpu():
        warm_up(engine, config)
    limit = settings.draft_block_size or engine.drafter.max_draft_tokens
    info = WorkerInfo(
        model=Path(settings.draft_model).name,
        architecture=config.kind,
        fingerprint=target.fingerprint,
        device=device_name(),
        dtype=target.dtype,
        vocab_size=target.vocab_size,
        max_model_len=target.max_model_len,
        num_slots=0,
        kv_capacity_tokens=0,
        capacity_classes=[],
        kv_bytes_per_token=0,
        max_step_tokens=0,
        eos_token_ids=[],
        draft_kind=config.kind,
        max_draft_tokens=min(limit, engine.drafter.max_draft_tokens),
    )
    return engine, info


def warm_up(engine: DraftEngine, config: DrafterConfig) -> None:
    """Draft for a few batch sizes, so that kernels are compiled before the policy measures a draft."""
    drafter, context = engine.drafter, 16
    for batch in WARM_UP_BATCHES:
        states = [drafter.new_state() for _ in range(batch)]
        features = [mx.zeros((context, max(1, config.hidden_size)), mx.bfloat16)] * batch
        drafter.extend(states, features, [[1] * context] * batch)
        mx.eval(drafter.draft(states, [1] * batch, drafter.max_draft_tokens).token_ids)


def _tables(target: LoadedModel, config: DrafterConfig) -> tuple[Any, Any]:
    """The target's embedding and head, for a checkpoint without its own."""
    if config.has_own_embedding and config.has_own_head:
        return None, None
    model = target.model
    if not (hasattr(model, "embed") and hasattr(model, "logits")):
        raise BadModel(f"{target.architecture} does not share its embedding and head; this drafter needs them")
    return model.embed, model.logits


def _check_same_vocabulary(target: LoadedModel, drafter: LoadedModel) -> None:
    if target.vocab_size != drafter.vocab_size or target.eos_token_ids != drafter.eos_token_ids:
        sizes = json.dumps([target.vocab_size, drafter.vocab_size])
        raise BadModel(f"the draft model's vocabulary is not the target's (sizes {sizes}, or other end tokens)")
