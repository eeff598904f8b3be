"""The real core, engine and draft engine in one process: messages are handed over one at a time, nothing waits.

The clock is the rig's own, so that a run is the same each time; `random` decides when requests join and leave.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from scheduler.core import Core
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope
from scheduler.session import Session
from shared.config import Settings
from shared.messages import (
    Cancel,
    Draft,
    DraftReply,
    DraftRequest,
    DraftRow,
    FeatureRows,
    Heartbeat,
    Hello,
    LoadBlocks,
    Message,
    Output,
    Outputs,
    PrefixCacheInfo,
    Ready,
    Rejected,
    Release,
    RequestId,
    SamplingParams,
    Step,
    Submit,
    TokenLogprob,
    Welcome,
)
from tests.support.fake_target import worker_info
from tests.support.layouts import store_of
from tests.workers.tiny_architectures import RUNS, config_of
from workers.adapters import Adapters
from workers.build import prefix_cache_info
from workers.cache.layouts import make_block_pool
from workers.cache.spec import LayerSpec
from workers.engine import Engine
from workers.features import Bits
from workers.load.folder import mlx_lm_classes
from workers.media import SlotMedia
from workers.models import decoder
from workers.models.base import TextModel
from workers.models.mlxlm import adapted
from workers.runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)
VOCAB = 50  # as tests/workers/drafters/tiny_checkpoints.py has it
HIDDEN = 24
WINDOW = 8
CLASSES = [16, 48, 128]
MAX_STEP_TOKENS = 24
STEP_S = 0.01

Fusion = Callable[[Sequence[mx.array]], mx.array]


def decoder_target(num_layers: int = 6, window: int | None = None, vocab_size: int = VOCAB, seed: int = 0) -> TextModel:
    """A tiny decoder of ours with random weights; with `window` every other layer slides."""
    kinds = ["full_attention" if window is None or i % 2 else "sliding_attention" for i in range(num_layers)]
    config = {
        "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 256, "sliding_window": window,
        "use_sliding_window": window is not None, "layer_types": kinds,
    }  # fmt: skip
    mx.random.seed(seed)
    model = decoder.Model(decoder.DecoderConfig.from_hf(config, 256))
    shuffle_weights(model)
    return model


def mlx_lm_target(architecture: str, seed: int = 0, **changes: object) -> TextModel:
    """An architecture of mlx-lm, tiny; `changes` go into its configuration."""
    config = config_of(architecture, RUNS[architecture]) | changes
    mx.random.seed(seed)
    model_class, args_class = mlx_lm_classes(config)
    model = model_class(args_class.from_dict(config))
    # Only matrices: time constants and gates of recurrent layers keep their scale.
    weights = [
        (name, array * 3.0 if name.endswith("proj.weight") or "embed" in name else array)
        for name, array in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return adapted(model, architecture)


def shuffle_weights(model: object, scale: float = 0.4) -> None:
    """Larger than an initialisation, so that a greedy text is not one token repeated."""
    parameters = tree_map(lambda a: mx.random.normal(a.shape) * scale, model.parameters())  # type: ignore[attr-defined]
    model.update(parameters)  # type: ignore[attr-defined]
    mx.eval(model.parameters())  # type: ignore[attr-defined]


def make_engine(
    model: TextModel,
    num_slots: int = 16,
    is_exact: bool = True,
    classes: Sequence[int] = CLASSES,
    max_width: int = 32,
    block_size: int | None = None,
    layout: str = "slots",
    adapters: Adapters | None = None,
) -> Engine:
    """With a `block_size` the engine has a prefix cache."""
    specs: list[LayerSpec] = model.layer_specs()
    store = store_of(layout, specs, list(classes), max_width, is_exact, block_size or 16)
    blocks = make_block_pool(store, block_size) if block_size is not None else None
    return Engine(ModelRunner(model), store, num_slots, model.vocab_size, blocks, adapters=adapters)


def prefix_info(engine: Engine, num_blocks: int, num_states: int = 6) -> PrefixCacheInfo | None:
    """As `workers.build` makes it, with a pool of a given size."""
    if engine.blocks is None:
        return None
    info = prefix_cache_info(engine.store.specs, engine.store, 1 << 40, 1)
    assert info is not None, "there is memory enough"
    rings = [layer.capacities[-1] for layer in engine.store.kv_layers if layer.spec.window is not None]
    return msgspec.structs.replace(
        info, block_size=engine.blocks.block_size, num_blocks=num_blocks,
        num_states=num_states if info.is_recurrent else 0, ring_tokens=min(rings) - 32 if rings else 0,
    )  # fmt: skip


class Drafts(Protocol):
    """What the rig asks of a draft engine."""

    def take_tokens(self, row: DraftRow) -> None: ...
    def take_features(self, rows: FeatureRows, array: Bits) -> None: ...
    def end(self, request_ids: list[RequestId]) -> None: ...
    def draft(self, rows: list[DraftRow]) -> list[Draft]: ...


@dataclass
class ForcedDrafts:
    """Proposes the true continuation, with each token wrong with a chance that depends on the request.

    Args:
        truth: request -> prompt and output.
        chances: request -> chance that a drafted token is right.
    """

    truth: Mapping[str, Sequence[int]]
    chances: Mapping[str, float]
    random: random.Random = field(default_factory=lambda: random.Random(5))
    num_asked: int = 0

    def take_tokens(self, row: DraftRow) -> None: ...

    def take_features(self, rows: FeatureRows, array: Bits) -> None: ...

    def end(self, request_ids: list[RequestId]) -> None: ...

    def draft(self, rows: list[DraftRow]) -> list[Draft]:
        return [self._draft(row) for row in rows]

    def _draft(self, row: DraftRow) -> Draft:
        self.num_asked += 1
        anchor = row.start + len(row.token_ids) - 1
        right = self.truth[row.request_id][anchor + 1 : anchor + 1 + row.num_tokens]
        chance = self.chances[row.request_id]
        drafted = [t if self.random.random() < chance else (t + 1) % VOCAB for t in right]
        drafted = drafted[: self.random.randint(0, row.num_tokens)] if self.random.random() < 0.3 else drafted
        return Draft(request_id=row.request_id, anchor=anchor, token_ids=drafted)


class EngineRig:
    """Args:
    engine: the target; one that captures features sends them to `drafter`.
    drafter: None for plain decoding (or n-gram drafts only).
    k: drafted tokens in every step; None leaves it to the policy.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafts | None = None,
        k: int | None = None,
        max_draft: int = 8,
        num_blocks: int = 24,
        **changes: object,
    ) -> None:
        self.engine, self.drafter, self.k = engine, drafter, k
        engine.reset()
        self.core = Core(Settings(draft_block_size=max_draft, draft_model="none", **changes), Metrics())  # type: ignore[arg-type]
        self.core.speculator.forced_k = k
        self.now = 100.0
        self.epochs: dict[str, int] = {}
        self.queue: deque[Step | Release | LoadBlocks] = deque()
        self.outputs: dict[str, list[Output]] = {}
        self.num_steps = 0
        self.target = "target"  # as the core knows it; another name for the one that follows a lost one
        self.send("front", Hello(role="frontend", instance_id="front", pid=1))
        classes = engine.store.placement.capacities
        info = worker_info(
            vocab_size=engine.vocab_size, max_model_len=classes[-1], num_slots=engine._num_slots,
            kv_capacity_tokens=classes[-1] * engine._num_slots, capacity_classes=classes,
            max_step_tokens=MAX_STEP_TOKENS * 8, max_draft_tokens=max_draft,
            prefix_cache=prefix_info(engine, num_blocks),
            modalities=engine.media.modalities if engine.media is not None else [],
            whole_media=engine.media.whole_media if engine.media is not None else [],
            embedding_size=1 if engine.model.shows_hidden else 0,  # the core asks only whether there is one
            adapters=engine.adapters.fingerprints if engine.adapters is not None else {},
        )  # fmt: skip
        self.send("target", Hello(role="target", instance_id="target", pid=2))
        self.send("target", Ready(epoch=self.epochs["target"], info=info))
        self.session.planner.max_prefill_tokens = MAX_STEP_TOKENS
        if drafter is not None:
            drafts = worker_info(draft_kind="test", max_draft_tokens=max_draft)
            self.send("drafter", Hello(role="drafter", instance_id="drafter", pid=3))
            self.send("drafter", Ready(epoch=self.epochs["drafter"], info=drafts))

    @property
    def session(self) -> Session:
        assert self.core.session is not None, "no target is ready"
        return self.core.session

    def send(self, sender: str, message: Message) -> None:
        self.now += 1e-4
        envelopes = self.core.handle(sender, message, self.now)
        self.core.check_integrity()
        self._deliver(envelopes)

    def _deliver(self, envelopes: list[Envelope]) -> None:
        requests: list[DraftRequest] = []
        for receiver, message in envelopes:
            match message:
                case Welcome():
                    self.epochs[receiver] = message.epoch
                case Outputs():
                    for output in message.outputs:
                        self.outputs.setdefault(output.request_id, []).append(output)
                case Rejected():
                    raise AssertionError(message.message)
                case Step() | Release() | LoadBlocks():
                    self.queue.append(message)
                case DraftRequest():
                    requests.append(message)
        for request in requests:
            self._draft(request)

    def _draft(self, request: DraftRequest) -> None:
        assert self.drafter is not None
        self.drafter.end(request.ended)
        for row in request.rows:
            self.drafter.take_tokens(row)
        drafts = self.drafter.draft(request.rows)
        reply = DraftReply(epoch=request.epoch, draft_id=request.draft_id, drafts=drafts, seconds=0.0)
        self.send("drafter", reply)

    def work(self) -> bool:
        """Let the target handle one message."""
        if not self.queue:
            return False
        message = self.queue.popleft()
        if isinstance(message, Release):
            self.engine.release(message.slots, message.stores)
            if message.shrink is not None:
                self.engine.shrink(message.shrink.kept_blocks, message.shrink.free_states)
            return True
        assert isinstance(message, Step), "a rig without an archive is asked for its blocks"
        self.num_steps += 1
        pending = self.engine.begin(message)
        result = self.engine.finish(pending)
        features = self.engine.feature_rows(pending, result) if self.engine.model.captures else None
        self.engine.store.placement.check_integrity()
        if features is not None and self.drafter is not None:
            at = 0
            for rows in features[0]:
                self.drafter.take_features(rows, features[1][at : at + rows.num_rows])
                at += rows.num_rows
        self.now += STEP_S
        self.send(self.target, result)
        return True

    def lose_target(self) -> None:
        """The target dies with the steps in its hands; the one that follows knows nothing."""
        info = self.core.target.info
        assert info is not None, "a target that was ready"
        info = msgspec.structs.replace(info, max_step_tokens=self.session.planner.max_prefill_tokens)
        self.queue.clear()
        self.engine.reset()
        if self.engine.media is not None:
            self.engine.media = SlotMedia(self.engine.model.model)
        self.target += "+"
        self.send(self.target, Hello(role="target", instance_id=self.target, pid=9))
        self.send(self.target, Ready(epoch=self.epochs[self.target], info=info))

    def drain(self) -> None:
        for _ in range(100_000):
            if not self.work():
                assert not self.core.status().num_running, "requests run and nothing is to do"
                assert not len(self.core.waiting), "requests wait and nothing is to do"
                return
        raise AssertionError("the schedule does not end")

    def tell_memory(self, used_bytes: int) -> None:
        """The target's heartbeat, then the scheduler's own look at the budget."""
        self.send("target", Heartbeat(instance_id="target", memory_bytes={"resident": used_bytes}))
        self._deliver(self.core.tick(self.now))
        self.core.check_integrity()

    def submit(
        self, name: str, prompt: list[int], max_tokens: int, sampling: SamplingParams = GREEDY, **more: object
    ) -> None:
        self.send(
            "front",
            Submit(
                request_id=RequestId(name), prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens,
                **more,  # type: ignore[arg-type]
            ),
        )  # fmt: skip

    def run(
        self,
        prompts: Mapping[str, list[int]],
        max_tokens: int,
        sampling: SamplingParams | Mapping[str, SamplingParams] = GREEDY,
        schedule: random.Random | None = None,
        **more: object,
    ) -> dict[str, list[int]]:
        """Tokens of each request. With a `schedule` they join between steps, and strangers come and leave."""
        for i, (name, prompt) in enumerate(prompts.items()):
            chosen = sampling if isinstance(sampling, SamplingParams) else sampling[name]
            self.submit(name, prompt, max_tokens, chosen, **more)
            if schedule is None:
                continue
            if schedule.random() < 0.3:
                self.submit(f"stranger{i}", prompt[::-1], max_tokens)
            for _ in range(schedule.randrange(5)):
                self.work()
            if schedule.random() < 0.5:
                self.send("front", Cancel(request_id=RequestId(f"stranger{schedule.randrange(i + 1)}")))
        self.drain()
        assert self.session.slots.used_tokens == 0, "a slot is still held"
        return {name: self.tokens(name) for name in prompts}

    def tokens(self, name: str) -> list[int]:
        return [t for output in self.outputs.get(name, []) for t in output.token_ids]

    def logprobs(self, name: str) -> list[TokenLogprob]:
        return [p for output in self.outputs.get(name, []) for p in output.logprobs or []]

    def counts(self, names: Sequence[str]) -> tuple[int, int]:
        """(drafted, accepted) tokens of finished requests."""
        timings = [t for name in names if (t := self.outputs[name][-1].timings) is not None]
        return sum(t.num_draft_tokens for t in timings), sum(t.num_accepted_tokens for t in timings)


def make_prompts(count: int, vocab_size: int = VOCAB, seed: int = 1) -> dict[str, list[int]]:
    """Lengths from one token to several prefill chunks."""
    rng = random.Random(seed)
    lengths = (1, 3, 7, 12, 30, 60)
    return {f"r{i}": [rng.randrange(vocab_size) for _ in range(rng.choice(lengths))] for i in range(count)}
