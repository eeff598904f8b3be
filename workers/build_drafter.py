"""From a draft checkpoint to what runs: the fusion for the target process, the draft engine for the drafter's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np

from shared.config import Settings
from shared.errors import BadModel
from shared.messages import DraftRow, FeatureRows, RequestId, StepCost, WorkerInfo
from shared.model_files import resolve
from shared.shipped_drafters import resolve_drafter
from workers.cache.spec import AttentionSpec
from workers.draft_engine import DraftEngine
from workers.drafters.attending_cache import AttendingCache
from workers.drafters.base import FeatureDrafter
from workers.drafters.causal_lm import CausalLMDrafter
from workers.drafters.checkpoint import detect
from workers.drafters.config import DrafterConfig
from workers.drafters.registry import load_drafter, load_fusion
from workers.fingerprint import fingerprint
from workers.kernels.select import select
from workers.load import LoadedModel, load
from workers.machine import DTYPES, device_name, is_cpu, limit_cached_memory
from workers.models.base import TextModel
from workers.models.own import is_own
from workers.runner import ModelRunner

GPU_BATCHES, CPU_BATCHES = (1, 2, 4, 8, 16, 32), (1,)  # whose drafts are measured at start
WARM_UP_TOKENS = 16
REPEATS = 3


def draft_config(settings: Settings, target_config: dict[str, Any]) -> DrafterConfig | None:
    """What the draft checkpoint is; None without one (or for n-gram drafts, which need none).

    Raises:
        BadModel: it cannot be read, or is of a kind that we do not know.
    """
    if not settings.draft_checkpoint:
        return None
    files = resolve_drafter(settings)
    if files.folder is None:
        return DrafterConfig(kind="model", path=files.gguf or Path(), max_draft_tokens=settings.draft_block_size or 4)
    return detect(files.folder, target_config, settings.draft_kind or None)


def drafter_fingerprint(settings: Settings) -> str:
    """Equal for two drafters only if the target sends both the same features; empty without one.

    A drafter that is trained anew keeps its name: what was cached for the old one is no use to it.
    """
    if not settings.draft_checkpoint:
        return ""
    files = resolve_drafter(settings)
    if files.folder is None:
        return files.name  # a whole model in a GGUF file: it reads tokens, not features
    config = (files.folder / "config.json").read_text()
    return fingerprint(sorted(files.folder.glob("*.safetensors")), {"config": config}, settings.dtype)


def install_fusion(runner: ModelRunner, config: DrafterConfig | None, dtype: mx.Dtype) -> None:
    """Have the target keep the hidden states that this drafter needs."""
    if config is None:
        return
    fusion = load_fusion(config, dtype)
    if fusion is not None:
        runner.capture(config.taps, fusion, config.kv_layers)


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
        model = load(resolve_drafter(settings), settings.dtype)
        _check_same_vocabulary(target, model)
        engine = DraftEngine(_causal_lm(model.model, target.vocab_size), needs_features=False)
    else:
        embed, head = target_tables(target, config)
        engine = DraftEngine(load_drafter(config, dtype, embed, head), config.feature != "none", dtype)
    if not is_cpu():
        limit_cached_memory()
        select_attention(engine, dtype, settings)
    limit = min(settings.draft_block_size or engine.drafter.max_draft_tokens, engine.drafter.max_draft_tokens)
    costs = draft_costs(engine, max(1, config.feature_size), limit)
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
        max_draft_tokens=limit,
        step_costs=costs,
    )
    return engine, info


def select_attention(engine: DraftEngine, dtype: mx.Dtype, settings: Settings) -> None:
    """Give the drafter's layers the kernels that proved themselves here."""
    drafter = engine.drafter
    if not isinstance(drafter, FeatureDrafter) or not drafter.draft_widths:
        return
    specs = [spec for spec in drafter.contexts.store.specs if isinstance(spec, AttentionSpec)]
    layers = [(spec, drafter.num_query_heads) for spec in specs]
    setting = "stock" if settings.attention == "stock" else "auto"  # what is forced, is forced on the target
    drafter.use_attention(
        select(
            layers, dtype, setting, is_speculative=True, cache_folder=settings.cache_folder, widths=drafter.draft_widths
        )
    )


def draft_costs(engine: DraftEngine, feature_size: int, max_draft_tokens: int) -> list[StepCost]:
    """Seconds of a draft by batch and number of tokens, the best of a few. Kernels are compiled on the way."""
    costs: list[StepCost] = []
    lengths = sorted({min(max_draft_tokens, (1 << bits) - 1) for bits in range(1, max_draft_tokens.bit_length() + 1)})
    for batch in CPU_BATCHES if is_cpu() else GPU_BATCHES:
        names = [RequestId(f"calibration-{i}") for i in range(batch)]
        rows = np.zeros((WARM_UP_TOKENS, feature_size), np.float32 if engine.dtype == mx.float32 else np.uint16)
        for name in names if engine.needs_features else ():
            engine.take_features(FeatureRows(request_id=name, start=0, num_rows=WARM_UP_TOKENS), rows)
        asked = [
            DraftRow(request_id=name, start=0, token_ids=[1] * (WARM_UP_TOKENS + 1), num_tokens=1) for name in names
        ]
        for row in asked:
            engine.take_tokens(row)
        for k in lengths:
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                engine.draft([msgspec.structs.replace(row, num_tokens=k) for row in asked])
                seconds.append(time.perf_counter() - started)
            costs.append(StepCost(batch=batch, width=k, seconds=min(seconds)))
        engine.reset()
    return costs


def target_tables(target: LoadedModel, config: DrafterConfig) -> tuple[Any, Any]:
    """The target's embedding and head, for a checkpoint without its own."""
    if config.has_own_embedding and config.has_own_head:
        return None, None
    model = target.model
    if not (hasattr(model, "embed") and hasattr(model, "logits")):
        raise BadModel(f"{target.architecture} does not share its embedding and head; this drafter needs them")
    # Gemma's own scale and softcap are the drafter's to apply, as its checkpoint says.
    return getattr(model, "embedding_rows", model.embed), getattr(model, "uncapped_logits", model.logits)


def _causal_lm(model: TextModel, target_vocab_size: int) -> CausalLMDrafter:
    """A model of our own attends through caches with `attend`, those of mlx-lm through mlx-lm's."""
    specs = [spec for spec in model.layer_specs() if isinstance(spec, AttentionSpec)]
    is_ours = isinstance(model, nn.Module) and is_own(model)
    make_cache = (lambda: [AttendingCache(spec) for spec in specs]) if is_ours else None
    return CausalLMDrafter(model, target_vocab_size, make_cache)


def _check_same_vocabulary(target: LoadedModel, drafter: LoadedModel) -> None:
    if target.vocab_size != drafter.vocab_size or target.eos_token_ids != drafter.eos_token_ids:
        sizes = json.dumps([target.vocab_size, drafter.vocab_size])
        raise BadModel(f"the draft model's vocabulary is not the target's (sizes {sizes}, or other end tokens)")
