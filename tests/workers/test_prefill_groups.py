"""Prompts that arrive together share forwards on a GPU, and their tokens stay what they are alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from shared.messages import RequestId, SequenceStart, Step, StepRow
from tests.support.engine_rig import GREEDY, EngineRig, decoder_target, make_engine
from workers.cache.spec import AttentionSpec
from workers.engine import Engine
from workers.kernels.choice import AttentionChoice, ShapeClass
from workers.kernels.reference import ReferenceAttention
from workers.prefill_groups import MAX_GROUP_TOKENS, prefill_groups

CLASSES = [64, 128, 256]


def row(slot: int, start: int, num_tokens: int) -> StepRow:
    return StepRow(slot=slot, start=start, capacity=4096, token_ids=[1] * num_tokens)


def test_groups_have_few_sizes_and_bounded_tokens() -> None:
    rows = [row(i, 0, 100) for i in range(13)] + [row(20, 32, 100), row(21, 0, 3000)]
    groups = list(prefill_groups(rows, lambda r: (r.start, len(r.token_ids or [])), lambda r: len(r.token_ids or [])))
    assert sorted(len(g) for g in groups) == [1, 1, 1, 4, 8]
    assert sorted(r.slot for g in groups for r in g) == sorted(r.slot for r in rows)
    wide = list(prefill_groups([row(i, 0, 600) for i in range(7)], lambda r: 0, lambda r: 600))
    assert [len(g) for g in wide] == [2, 2, 2, 1]
    assert all(len(g) * 600 <= MAX_GROUP_TOKENS for g in wide)
    alone = list(prefill_groups(rows, lambda r: None, lambda r: 1))
    assert alone == [[r] for r in rows]


def by_kernels(engine: Engine, model) -> Engine:
    """With the kernels' arithmetic in stock operations: decode rows and chunks go the kernels' way."""
    used = {}
    for spec, num_heads in zip(engine.store.specs, model.query_heads(), strict=True):
        assert isinstance(spec, AttentionSpec)
        for rows in range(17):
            used[ShapeClass(num_heads, spec.num_kv_heads, spec.key_dim, rows, engine.store.kv_layers[0].dtype)] = True
    engine.store.use_attention(AttentionChoice(ReferenceAttention(), used, has_tiles=True))
    return engine


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_prompts_that_arrive_together_give_the_tokens_of_each_alone(window: int | None, has_kernels: bool) -> None:
    model = decoder_target(window=window)
    lengths = [45, 60, 33, 64, 50, 5, 90, 41, 7, 62, 64]
    prompts = {str(i): [(7 * i + 3 * j) % 50 for j in range(n)] for i, n in enumerate(lengths)}
    sizes: list[int] = []

    def rig(is_exact: bool) -> EngineRig:
        engine = make_engine(model, 16, is_exact, classes=CLASSES, max_width=128)
        made = EngineRig(by_kernels(engine, model) if has_kernels and not is_exact else engine)
        made.session.planner.max_prefill_tokens = 128
        made.session.planner.max_step_tokens = 2048
        return made

    exact = rig(True)
    alone = {name: exact.run({name: prompt}, 8)[name] for name, prompt in prompts.items()}
    together = rig(False)
    forward = together.engine._forward

    def counted(group: list[StepRow]) -> object:
        sizes.append(len(group) if len(group[0].token_ids or []) > 1 else 0)
        return forward(group)

    together.engine._forward = counted  # type: ignore[method-assign, assignment]
    assert together.run(prompts, 8) == alone
    assert max(sizes) >= 4, "nothing was grouped"


def test_prompts_that_go_on_from_different_positions_share_a_forward_where_kernels_attend_in_tiles() -> None:
    """As prompts do of which different prefixes are cached."""
    model = decoder_target(window=24)
    prompts = [[(7 * i + 3 * j) % 50 for j in range(n)] for i, n in enumerate([40, 57, 75, 61])]
    known = [7, 16, 32, 21]
    engine = by_kernels(make_engine(model, 4, False, classes=CLASSES, max_width=128), model)
    shapes: list[tuple[int, ...]] = []
    hidden_rows = engine.model.hidden_rows

    def watched(inputs: mx.array, *rest: Any) -> mx.array:
        shapes.append(inputs.shape)
        return hidden_rows(inputs, *rest)

    def step(ends: list[int], firsts: list[int], *, is_sampled: bool) -> list[list[int]]:
        starts = [
            SequenceStart(
                slot=i, request_id=RequestId(str(i)), sampling=GREEDY, num_prompt_tokens=len(p), token_ids=p
            )
            for i, p in enumerate(prompts) if not firsts[i]
        ]  # fmt: skip
        rows = [
            StepRow(slot=i, start=first, capacity=90, token_ids=prompts[i][first:end], is_sampled=is_sampled)
            for i, (first, end) in enumerate(zip(firsts, ends, strict=True))
        ]
        result = engine.finish(engine.begin(Step(epoch=0, step_id=0, starts=starts, decodes=[], prefills=rows)))
        return [row.token_ids for row in sorted(result.rows, key=lambda row: row.slot)]

    step(known, [0] * 4, is_sampled=False)
    engine.model.hidden_rows = watched  # type: ignore[method-assign]
    together = step([len(p) for p in prompts], known, is_sampled=True)
    assert shapes == [(4, 64)]
    alone = EngineRig(make_engine(model)).run({str(i): p for i, p in enumerate(prompts)}, 1)
    assert together == [alone[str(i)] for i in range(4)]
