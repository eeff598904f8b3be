"""A prefix hit does not blind a drafter: it proposes what it would have proposed without one."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from shared.config import Settings
from shared.messages import Draft, DraftRow, FeatureRows, RequestId
from tests.support import tiny_model
from tests.support.engine_rig import VOCAB, EngineRig, decoder_target, make_engine
from tests.workers.drafters import tiny_checkpoints as tiny
from workers.build_drafter import drafter_fingerprint
from workers.cache.layouts import LAYOUTS
from workers.draft_engine import DraftEngine
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter, load_fusion
from workers.engine import Engine
from workers.features import Bits


class Recorder:
    """A draft engine that remembers what was proposed where, by the anchor's position."""

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self.proposed: dict[int, list[int]] = {}
        self.num_rows = 0

    def take_tokens(self, row: DraftRow) -> None:
        self._engine.take_tokens(row)

    def take_features(self, rows: FeatureRows, array: Bits) -> None:
        self.num_rows += rows.num_rows
        self._engine.take_features(rows, array)

    def end(self, request_ids: list[RequestId]) -> None:
        self._engine.end(request_ids)

    def draft(self, rows: list[DraftRow]) -> list[Draft]:
        drafts = self._engine.draft(rows)
        self.proposed |= {d.anchor: d.token_ids for d in drafts}
        return drafts


class RecorderByRequest(Recorder):
    """Remembers by request, too."""

    def __init__(self, engine: DraftEngine) -> None:
        super().__init__(engine)
        self.of_requests: dict[tuple[RequestId, int], list[int]] = {}

    def draft(self, rows: list[DraftRow]) -> list[Draft]:
        drafts = super().draft(rows)
        self.of_requests |= {(d.request_id, d.anchor): d.token_ids for d in drafts}
        return drafts


def drafted_engine(kind: str, folder: Path, layout: str = "slots") -> tuple[Engine, DraftEngine]:
    engine = make_engine(decoder_target(), num_slots=4, block_size=4, layout=layout)
    checkpoint, _ = getattr(tiny, kind)(folder / kind)
    config = detect(checkpoint)
    engine.model.capture(config.taps, load_fusion(config, mx.float32))
    model = engine.model.model
    return engine, DraftEngine(load_drafter(config, mx.float32, model.embed, model.logits), needs_features=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "mtp"])
def test_drafts_after_a_hit_are_those_without_one(kind: str, layout: str, tmp_path: Path) -> None:
    engine, drafts = drafted_engine(kind, tmp_path, layout)
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB) for _ in range(22)]
    prompt = [*shared, *(rng.randrange(VOCAB) for _ in range(9))]
    rig = EngineRig(engine, (cold := Recorder(drafts)), k=3, num_blocks=40)
    expected = rig.run({"cold": prompt}, 8)["cold"]
    drafts.reset()
    rig = EngineRig(engine, (warm := Recorder(drafts)), k=3, num_blocks=40)
    rig.run({"other": [*shared, 1, 2, 3]}, 4)
    warm.proposed.clear()
    warm.num_rows = 0
    assert rig.run({"warm": prompt}, 8)["warm"] == expected
    timings = rig.outputs["warm"][-1].timings
    assert timings is not None
    assert timings.num_cached_tokens == 20
    assert warm.proposed == cold.proposed
    assert len(warm.proposed) >= 2
    assert warm.num_rows >= len(prompt), "the restored positions' features were not sent"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "mtp"])
def test_drafts_after_features_were_held_back_are_those_without(
    kind: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While drafts do not pay nothing is sent, not even what the prefix cache has; then all of it at once."""
    engine, drafts = drafted_engine(kind, tmp_path, layout)
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB) for _ in range(22)]
    prompts = {"a": [*shared, *(rng.randrange(VOCAB) for _ in range(9))], "b": shared[:7]}
    rig = EngineRig(engine, (always := RecorderByRequest(drafts)), k=3, num_blocks=40)
    expected = rig.run(prompts, 12)
    drafts.reset()
    rig = EngineRig(engine, (late := RecorderByRequest(drafts)), k=None, num_blocks=40)
    rig.run({"other": [*shared, 1, 2, 3]}, 4)
    late.num_rows = 0
    held: list[int] = []

    def is_held(*_: object) -> bool:
        is_early = any(len(s.token_ids) - s.num_prompt_tokens < 5 for s in rig.session.running)
        if is_early:
            assert late.num_rows == 0, "rows were sent that nobody drafts from"
            held.append(1)
        return is_early

    monkeypatch.setattr(rig.core.speculator, "holds_features", is_held)
    monkeypatch.setattr(rig.core.speculator, "choose_k", lambda *_: 0 if is_held() else 3)
    late.of_requests.clear()
    rig.session._holds_features = True  # as the last row that decoded left it
    assert rig.run(prompts, 12) == expected
    timings = rig.outputs["a"][-1].timings
    assert timings is not None
    assert timings.num_cached_tokens == 20
    assert len(held) > 5
    assert late.num_rows >= len(prompts["a"]) + len(prompts["b"]) + 8
    both = set(late.of_requests) & set(always.of_requests)
    assert both
    for name in both:
        assert late.of_requests[name] == always.of_requests[name]


def test_features_kept_for_a_drafter_are_not_those_of_one_trained_anew_under_its_name(tmp_path: Path) -> None:
    target = tiny_model.write(tmp_path / "target")
    settings = Settings(draft_model=str(tiny_model.write_eagle3(tmp_path / "drafter", target)))
    before = drafter_fingerprint(settings)
    assert drafter_fingerprint(settings) == before
    tiny_model.write_eagle3(tmp_path / "drafter", target, seed=1)
    assert drafter_fingerprint(settings) != before
    assert drafter_fingerprint(Settings(draft_model="ngram")) == ""
