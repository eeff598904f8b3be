"""From model files to an engine: loads the weights, sizes the caches for the machine, warms up."""

from __future__ import annotations

import logging

import msgspec
import psutil

from shared import adapters, tokenizer
from shared.config import Settings
from shared.errors import BadModel, InvalidRequest
from shared.grammar import Compiler
from shared.messages import PrefixCacheInfo, SamplingParams, SequenceStart, Step, StepRow, WorkerInfo
from shared.model_files import ModelFiles
from workers import choose_attention, cuda
from workers.archiver import Archiver
from workers.build_drafter import draft_config, drafter_fingerprint, install_fusion
from workers.cache.archive import Archive
from workers.cache.layouts import make_block_pool, make_store
from workers.cache.paged import PagedStore
from workers.cache.spec import AttentionSpec, LayerSpec, RecurrentSpec, leaves
from workers.cache.store import CacheStore, bytes_per_token
from workers.calibrate import step_costs
from workers.early_start import install_starts
from workers.engine import Engine
from workers.exactness import probe
from workers.load import LoadedModel, load
from workers.load.servable import read_config
from workers.machine import (
    DTYPES,
    device_memory_bytes,
    device_name,
    free_device_memory_bytes,
    has_own_memory,
    is_cpu,
    limit_cached_memory,
)
from workers.models.base import MediaModel
from workers.own_attention import may_serve_all
from workers.runner import ModelRunner

logger = logging.getLogger("target")

GIB = 1 << 30
# A CPU is compute-bound, so a chunk buys nothing beyond about a hundred rows and delays the decode rows beside it.
CPU_STEP_TOKENS = 128
GPU_STEP_TOKENS = 2048
CPU_SLOTS = 32
GPU_SLOTS = 64
SMALLEST_CLASS = 512
CLASS_RATIO_CPU = 2  # fresh memory is what costs there: 0.25 s for 100 MB with all its page faults
CLASS_RATIO_GPU = 4  # each class in a batch is a launch
MEMORY_SHARE_CPU = 0.25  # of the machine's memory, for keys and values
MEMORY_SHARE_GPU = 0.85  # of what the weights leave free of the device's memory
# Tokens. MLX's own attention on CUDA compiles an engine for lengths of whole tiles and one for others, 0.9 and 0.5 s.
CUDA_WARM_PROMPTS = (2048, 192)
MAX_DRAFT_WIDTH = 32  # widest verify row
BLOCK_SIZE = 32  # tokens of a prefix cache block
PREFIX_SHARE = 0.4  # of the KV memory, for cached prefixes
STATE_SHARE = 0.5  # of that, for the recurrent states of a model that has some
MAX_BLOCKS = 1 << 17
HOST_SHARE = 0.1  # of the machine's memory, for copies of blocks where the device has memory of its own
MAX_STATES = 512
RING_MARGIN = 64  # positions that drafts and padding may have overwritten in a ring
SLACK = 64  # positions behind each slot for the padding of verify rows and of prefill chunks


def capacity_classes(max_model_len: int) -> list[int]:
    """Ascending slot sizes; the last one holds the whole context."""
    sizes, ratio = [SMALLEST_CLASS], CLASS_RATIO_CPU if is_cpu() else CLASS_RATIO_GPU
    while sizes[-1] < max_model_len:
        sizes.append(sizes[-1] * ratio)
    return sorted({min(size, max_model_len) for size in sizes})


def load_target(files: ModelFiles, settings: Settings) -> LoadedModel:
    """Raises:
    BadModel: the files, or those of an adapter, cannot be loaded.
    BadConfig: the setting of the adapters is malformed.
    """
    if not is_cpu() and is_all_our_attention(files, settings):
        cuda.leave_out_graphs()
    places = adapters.parse(settings.adapters)
    loaded = load(files, settings.dtype, trust_remote_code=settings.trust_remote_code, adapter_places=places)
    limit_cached_memory()
    return loaded


def is_all_our_attention(files: ModelFiles, settings: Settings) -> bool:
    """Whether our attention kernel may serve every layer of the model. False for files that cannot be read."""
    try:
        return settings.attention != "stock" and may_serve_all(read_config(files))
    except (BadModel, OSError):
        return False


def build_engine(files: ModelFiles, settings: Settings, loaded: LoadedModel | None = None) -> tuple[Engine, WorkerInfo]:
    """Args:
        loaded: what `load_target` gave for these files, where it has other uses too.
    Raises:
        BadModel: the files cannot be loaded, or the machine cannot hold one sequence of the model.
    """
    loaded = loaded or load_target(files, settings)
    engine, info = make_engine(loaded, settings)
    engine.grammars = grammar_compiler(files, loaded)
    install_fusion(engine.model, draft_config(settings, loaded.config), DTYPES[loaded.dtype])
    warm_up(engine, info)
    if engine.store.feature_layer is not None:
        info = _with_features(info, engine.store.feature_layer.row_bytes)
    if info.prefix_cache is not None and info.prefix_cache.is_recurrent:
        info = msgspec.structs.replace(
            info, prefix_cache=_with_states(info.prefix_cache, engine, settings.prefix_cache_bytes)
        )
    if engine.model.shows_hidden:
        info = msgspec.structs.replace(info, embedding_size=engine.hidden_size)
    if settings.draft_checkpoint or settings.is_ngram:
        costs = step_costs(engine, info, settings.cache_folder)
        info = msgspec.structs.replace(info, step_costs=costs, exactness=probe(engine, info))
    return engine, info


def grammar_compiler(files: ModelFiles, loaded: LoadedModel) -> Compiler | None:
    """None, with a line in the log, for a tokenizer that grammars cannot be used with."""
    try:
        known = tokenizer.load(files)
        return Compiler(known.tokenizer, {*known.eos_token_ids, *loaded.eos_token_ids}, loaded.vocab_size)
    except (BadModel, InvalidRequest) as error:
        logger.warning("no grammars with this model: %s", error)
        return None


def make_engine(loaded: LoadedModel, settings: Settings) -> tuple[Engine, WorkerInfo]:
    """Choose how the model attends, and size its caches: as many tokens as the memory budget holds, at least one full
    context.

    Raises:
        BadConfig: a kernel was asked for that this machine or model cannot have.
        BadModel: the machine cannot hold one sequence of the model.
    """
    chosen = choose_attention.choose(loaded, settings)
    specs = loaded.model.layer_specs()
    dtype = DTYPES[loaded.dtype]
    per_token = max(1, bytes_per_token(specs, dtype))
    budget = settings.kv_cache_bytes or _kv_budget_bytes()
    max_model_len = min(settings.max_model_len or loaded.max_model_len, loaded.max_model_len, budget // per_token)
    if max_model_len < min(256, loaded.max_model_len):
        raise BadModel(f"{budget / GIB:.2f} GiB for keys and values hold only {budget // per_token} tokens")
    num_slots = settings.max_num_seqs or (CPU_SLOTS if is_cpu() else GPU_SLOTS)
    step_tokens = settings.max_num_batched_tokens or (CPU_STEP_TOKENS if is_cpu() else GPU_STEP_TOKENS)
    classes = capacity_classes(max_model_len)
    if isinstance(loaded.model, MediaModel):
        step_tokens = max(step_tokens, loaded.model.max_whole_tokens)
    width = max(step_tokens, MAX_DRAFT_WIDTH)
    store = make_store(chosen.layout, specs, classes, width, dtype, is_cpu(), SLACK, BLOCK_SIZE)
    spare = budget - max_model_len * per_token  # one full context comes first
    prefix_bytes = min(settings.prefix_cache_bytes or int(budget * PREFIX_SHARE), spare)
    prefix = prefix_cache_info(specs, store, prefix_bytes, per_token) if settings.prefix_cache else None
    if prefix is not None:
        budget -= prefix.num_blocks * prefix.block_bytes
    blocks = make_block_pool(store, BLOCK_SIZE) if prefix is not None else None
    starts = install_starts(loaded.model) if has_own_memory() and not is_cpu() else None
    if isinstance(store, PagedStore):
        prefix_tokens = prefix.num_blocks * BLOCK_SIZE if prefix is not None else 0
        store.limit_growth(max(budget // per_token, max_model_len) + prefix_tokens)
    runner = ModelRunner(loaded.model)
    engine = Engine(runner, store, num_slots, loaded.vocab_size, blocks, starts, loaded.adapters)
    choose_attention.install(chosen.attention, loaded, store)
    info = WorkerInfo(
        model=loaded.name,
        architecture=loaded.architecture,
        fingerprint=loaded.fingerprint,
        device=device_name(),
        dtype=loaded.dtype,
        vocab_size=loaded.vocab_size,
        max_model_len=max_model_len,
        num_slots=num_slots,
        kv_capacity_tokens=max(budget // per_token, max_model_len),
        capacity_classes=classes,
        kv_bytes_per_token=per_token,
        max_step_tokens=step_tokens,
        eos_token_ids=loaded.eos_token_ids,
        max_draft_tokens=MAX_DRAFT_WIDTH - 1,
        packs_rows=engine.packs_rows,
        prefix_cache=prefix,
        whole_media=engine.media.whole_media if engine.media is not None else [],
        modalities=engine.media.modalities if engine.media is not None else [],
        adapters=loaded.adapters.fingerprints if loaded.adapters is not None else {},
        attention=_attention_lines(chosen),
    )
    return engine, info


def _attention_lines(chosen: choose_attention.Chosen) -> list[str]:
    """For `/health`: what serves, and why."""
    lines = [] if chosen.attention is None else list(chosen.attention.reasons)
    return ["keys and values in blocks that prefixes share", *lines] if chosen.layout == "paged" else lines


def prefix_cache_info(
    specs: list[LayerSpec], store: CacheStore, prefix_bytes: int, bytes_per_token: int
) -> PrefixCacheInfo | None:
    """What `prefix_bytes` hold; None where that is not one block."""
    attention = [s for s in leaves(specs) if isinstance(s, AttentionSpec)]
    windows = [s.window for s in attention if s.window is not None]
    rings = [layer.capacities[-1] for layer in store.kv_layers if layer.spec.window is not None]
    num_blocks = min(MAX_BLOCKS, max(0, prefix_bytes) // (BLOCK_SIZE * bytes_per_token))
    if num_blocks == 0:
        return None
    return PrefixCacheInfo(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        block_bytes=BLOCK_SIZE * bytes_per_token,
        window=max(windows, default=0),
        ring_tokens=min(rings) - RING_MARGIN if rings else 0,
        is_recurrent=any(isinstance(s, RecurrentSpec) for s in leaves(specs)),
        is_checkable=any(s.window is None for s in attention),
        is_shared=store.shares_blocks and not rings and not any(isinstance(s, RecurrentSpec) for s in leaves(specs)),
    )


def _with_features(info: WorkerInfo, bytes_per_token: int) -> WorkerInfo:
    """The memory also holds a drafter's features."""
    per_token = info.kv_bytes_per_token + bytes_per_token
    share = info.kv_bytes_per_token / per_token
    capacity = max(info.max_model_len, int(info.kv_capacity_tokens * share))
    prefix = info.prefix_cache
    if prefix is not None:
        num_blocks = max(1, int(prefix.num_blocks * share))
        prefix = msgspec.structs.replace(prefix, num_blocks=num_blocks, block_bytes=BLOCK_SIZE * per_token)
    return msgspec.structs.replace(info, kv_bytes_per_token=per_token, kv_capacity_tokens=capacity, prefix_cache=prefix)


def build_archiver(engine: Engine, info: WorkerInfo, settings: Settings) -> Archiver | None:
    """The prefix cache's tiers beyond the device; None where they or the cache are switched off."""
    host_bytes = settings.prefix_host_bytes
    if host_bytes < 0:  # on a Mac and on a CPU host memory is the device's own
        host_bytes = int(psutil.virtual_memory().total * HOST_SHARE) if has_own_memory() else 0
    if engine.blocks is None or not (settings.prefix_ssd_bytes or host_bytes):
        return None
    # Blocks also hold what a drafter gets, in the form that this drafter gets it.
    layout = f"{engine.blocks.layout}; features for {drafter_fingerprint(settings)}"
    archive = Archive(settings.prefix_folder, info.fingerprint, layout, settings.prefix_ssd_bytes, host_bytes)
    return Archiver(engine.blocks, archive)


def _with_states(info: PrefixCacheInfo, engine: Engine, prefix_bytes: int) -> PrefixCacheInfo:
    """Give part of the memory to recurrent states, whose size is known after a first forward."""
    state_bytes = max(1, engine.state_bytes)
    total = max(info.num_blocks * info.block_bytes, prefix_bytes)
    num_states = max(1, min(MAX_STATES, int(total * STATE_SHARE) // state_bytes))
    num_blocks = max(1, min(MAX_BLOCKS, (total - num_states * state_bytes) // info.block_bytes))
    return msgspec.structs.replace(info, num_states=num_states, state_bytes=state_bytes, num_blocks=num_blocks)


def _kv_budget_bytes() -> int:
    if is_cpu():
        return int(device_memory_bytes() * MEMORY_SHARE_CPU)
    return max(GIB // 4, int(free_device_memory_bytes() * MEMORY_SHARE_GPU))


def warm_up(engine: Engine, info: WorkerInfo) -> None:
    """A few prompts and one decode step: kernels are compiled and libraries loaded before the first request.

    Where there are adapters, also with one: all of them take the same way.
    """
    shortest = min(16, info.max_model_len - 1)
    for adapter in ("", *list(info.adapters)[:1]):
        _warm_up_prompt(engine, shortest, adapter)
        decode = StepRow(slot=0, start=shortest, capacity=shortest + 1)
        engine.finish(engine.begin(Step(epoch=0, step_id=0, starts=[], decodes=[decode], prefills=[])))
    engine.hidden_size = engine.model.final_rows().shape[-1] if engine.model.shows_hidden else 0
    engine.state_bytes = sum(layer.nbytes() for layer in engine.store.recurrent_layers)  # of the one slot in use
    for length in CUDA_WARM_PROMPTS if has_own_memory() else ():
        if length < info.max_model_len:
            _warm_up_prompt(engine, min(length, info.max_step_tokens))
    engine.reset()


def _warm_up_prompt(engine: Engine, length: int, adapter: str = "") -> None:
    tokens = [0] * length
    start = SequenceStart(
        slot=0,
        request_id="warm-up",  # type: ignore[arg-type] # a NewType of str
        sampling=SamplingParams(temperature=0.0),
        num_prompt_tokens=length,
        token_ids=tokens,
        adapter=adapter,
    )
    row = StepRow(slot=0, start=0, capacity=length + 1, token_ids=tokens)
    engine.finish(engine.begin(Step(epoch=0, step_id=0, starts=[start], decodes=[], prefills=[row])))
