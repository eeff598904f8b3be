"""Grammars and reasoning budgets in the engine: the same output alone, in a batch, drafted and after a preemption."""

from __future__ import annotations

import json
import random
import re

import pytest

from shared.errors import InvalidRequest
from shared.messages import Grammar, Heartbeat, Hello, Ready, SamplingParams
from tests.support.engine_rig import ForcedDrafts
from tests.support.grammar_rig import (
    EOS,
    THINK,
    THINK_END,
    GrammarRig,
    compiler,
    engine,
    ids,
    text_of,
    thinking,
    tokenizer,
)
from workers.sampling.constraint import Constraint, Mask

pytestmark = pytest.mark.mlx

HOT = SamplingParams(temperature=1.5, seed=3, is_seeded=True, num_logprobs=3)
COLOUR = Grammar(kind="regex", text="(red|green|dark blue)( sky)?")
LARK = 'start: item ("," item)*\nitem: WORD "=" NUMBER\nWORD: /[a-z]{1,3}/\nNUMBER: /[0-9]{1,2}/\n'
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 12}, "b": {"type": "boolean"}},
    "required": ["n", "s", "b"],
    "additionalProperties": False,
}
JSON = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
GRAMMARS = {"a": JSON, "b": COLOUR, "c": None, "d": Grammar(kind="lark", text=LARK), "e": JSON, "f": None}


def allowed(mask: Mask | None) -> set[int]:
    assert mask is not None
    return {t for t in range(len(mask) * 32) if mask[t // 32] >> t % 32 & 1}


def sampling(i: int) -> SamplingParams:
    changes = [{}, {"top_k": 20}, {"presence_penalty": 0.5}, {"min_p": 0.001}, {"temperature": 0.0}, {"top_p": 0.9}]
    values = {"temperature": 1.2, "seed": 40 + i, "is_seeded": True, "num_logprobs": 2} | changes[i % len(changes)]
    return SamplingParams(**values)  # type: ignore[arg-type]  # values by name


MAX_TOKENS = 120
Answer = tuple[list[int], list[float], str | None]


def answers(rig: GrammarRig, grammars: dict[str, Grammar | None] = GRAMMARS) -> dict[str, Answer]:
    for i, (name, grammar) in enumerate(grammars.items()):
        rig.ask(name, grammar, MAX_TOKENS, sampling(i))
    rig.drain()
    return {name: (rig.tokens(name), [p.logprob for p in rig.logprobs(name)], rig.reason(name)) for name in grammars}


def assert_same(got: dict[str, Answer], expected: dict[str, Answer]) -> None:
    for name, (tokens, logprobs, reason) in expected.items():
        assert (got[name][0], got[name][2]) == (tokens, reason)
        assert len(logprobs) == len(tokens)
        assert got[name][1] == pytest.approx(logprobs, abs=1e-3), "a wider row may differ in the last bits"


def forced(plain: dict[str, Answer]) -> ForcedDrafts:
    truth = {name: [*GrammarRig.PROMPT, *tokens] for name, (tokens, _, _) in plain.items()}
    return ForcedDrafts(truth, {name: 0.2 + 0.15 * i for i, name in enumerate(truth)})


def test_regex_and_lark_are_kept() -> None:
    rig = GrammarRig()
    for seed in range(6):
        rig.ask(f"r{seed}", COLOUR, 50, SamplingParams(temperature=2.0, seed=seed))
        rig.ask(f"l{seed}", Grammar(kind="lark", text=LARK), 400, SamplingParams(temperature=1.5, seed=seed))
        rig.ask(f"o{seed}", Grammar(kind="json_object"), 600, SamplingParams(temperature=0.7, seed=seed))
    rig.drain()
    for seed in range(6):
        assert re.fullmatch("(red|green|dark blue)( sky)?", rig.text(f"r{seed}"))
        assert re.fullmatch(r"[a-z]{1,3}=\d{1,2}(,[a-z]{1,3}=\d{1,2})*", rig.text(f"l{seed}"))
        assert rig.text(f"o{seed}").startswith("{")
        if rig.reason(f"o{seed}") == "stop":
            assert isinstance(json.loads(rig.text(f"o{seed}")), dict)
    assert len({rig.text(f"r{seed}") for seed in range(6)}) > 1, "the model still chooses"


def test_drafts_change_nothing_not_even_logprobs() -> None:
    plain = answers(GrammarRig())
    assert {name for name, (_, _, reason) in plain.items() if reason == "stop"} >= {"a", "b", "d"}
    drafted = GrammarRig(forced(plain), k=5)
    assert_same(answers(drafted), plain)
    num_drafted, num_accepted = drafted.counts(list(GRAMMARS))
    assert 0 < num_accepted < num_drafted
    assert_same(answers(GrammarRig(k=4, ngram=True)), plain)


def test_the_batch_changes_nothing() -> None:
    together = answers(GrammarRig())
    for i, (name, grammar) in enumerate(GRAMMARS.items()):
        rig = GrammarRig()
        rig.ask(name, grammar, MAX_TOKENS, sampling(i))
        rig.drain()
        assert rig.tokens(name) == together[name][0]


def test_preemption_and_a_new_target_rebuild_the_state() -> None:
    plain = answers(GrammarRig())
    rng = random.Random(4)
    for drafter in (None, forced(plain)):
        rig = GrammarRig(drafter, k=None if drafter is None else 3)
        for i, (name, grammar) in enumerate(GRAMMARS.items()):
            rig.ask(name, grammar, MAX_TOKENS, sampling(i))
        num_preempted = 0
        while rig.work():
            if rng.random() < 0.12 and rig.core.running:
                rig.core._preempt(rng.choice(rig.core.running))
                num_preempted += 1
                rig.send("target", Heartbeat(instance_id="target"))
        rig.drain()
        assert num_preempted > 2
        assert {name: rig.tokens(name) for name in GRAMMARS} == {name: tokens for name, (tokens, _, _) in plain.items()}
    rig = GrammarRig()
    for i, (name, grammar) in enumerate(GRAMMARS.items()):
        rig.ask(name, grammar, MAX_TOKENS, sampling(i))
    for _ in range(12):
        rig.work()
    restart_target(rig)
    rig.drain()
    assert {name: rig.tokens(name) for name in GRAMMARS} == {name: tokens for name, (tokens, _, _) in plain.items()}


def restart_target(rig: GrammarRig) -> None:
    info = rig.core.target.info  # type: ignore[union-attr]  # a target is ready
    rig.queue.clear()
    rig.engine.reset()
    rig.send("target", Hello(role="target", instance_id="target", pid=9))
    rig.send("target", Ready(epoch=rig.epochs["target"], info=info))  # type: ignore[arg-type]


def test_a_resumed_request_goes_on_inside_its_grammar() -> None:
    """What a frontend does after the scheduler's restart."""
    rig = GrammarRig()
    rig.ask("whole", JSON, 400, HOT)
    rig.drain()
    tokens = rig.tokens("whole")
    again = GrammarRig()
    again.ask("rest", JSON, 400, HOT, output_token_ids=tokens[:7])
    again.drain()
    assert again.tokens("rest") == tokens[7:]


def test_a_bad_grammar_fails_alone() -> None:
    plain = answers(GrammarRig(), {"c": None})
    rig = GrammarRig()
    for name, grammar in {"bad": Grammar(kind="regex", text="a("), "c": None}.items():
        rig.ask(name, grammar, MAX_TOKENS, sampling(0))
    rig.ask("left", COLOUR, MAX_TOKENS, sampling(0), output_token_ids=ids("purple"))
    rig.drain()
    assert rig.reason("bad") == "error" and "regex" in (rig.outputs["bad"][-1].error or "")
    assert rig.reason("left") == "error" and "grammar" in (rig.outputs["left"][-1].error or "")
    assert rig.tokens("c") == plain["c"][0]


def test_a_model_without_a_usable_tokenizer_fails_such_a_request_alone() -> None:
    without = engine(seed=1)
    without.grammars = None
    rig = GrammarRig(running=without)
    rig.ask("g", COLOUR, 20, HOT)
    rig.ask("plain", None, 5, HOT)
    rig.drain()
    assert rig.reason("g") == "error" and len(rig.tokens("plain")) == 5
    without.grammars = compiler()


def test_rows_without_a_grammar_stay_pipelined() -> None:
    """A constrained row is never queued behind its own unread token; the others are."""
    rig = GrammarRig()
    rig.ask("plain", None, 30, HOT)
    rig.ask("grammar", JSON, 200, HOT)
    slots: dict[str, list[bool]] = {"plain": [], "grammar": []}
    while rig.queue:
        for step in rig.queue:
            for row in getattr(step, "decodes", []):
                sequence = next((s for s in rig.core.running if s.slot == row.slot), None)
                if sequence is not None:
                    slots[sequence.submit.request_id].append(row.token_ids is None)
        rig.work()
    assert not any(slots["grammar"]) and any(slots["plain"])


# ---------------------------------------------------------------- masks


def test_masks_at_drafted_positions_follow_the_drafts_and_leave_no_trace() -> None:
    constraint = Constraint(compiler(), Grammar(kind="regex", text="abc|abd|xy"), None)
    before = allowed(constraint.masks([])[0])
    assert before == set(ids("ax")) | {tokenizer().token_to_id("ab")}
    a, b, c, d = (ids(x)[0] for x in "abcd")
    masks = constraint.masks([a, b, c])
    assert [allowed(m) for m in masks] == [before, {b}, {c, d}, {EOS}]
    masks = constraint.masks([a, c, b])  # c is forbidden after a: nothing behind it counts
    assert [None if m is None else allowed(m) for m in masks] == [before, {b}, None, None]
    assert allowed(constraint.masks([])[0]) == before
    constraint.advance([a, b])
    assert allowed(constraint.masks([])[0]) == {c, d}
    assert constraint.error is None
    constraint.advance([a])
    assert constraint.error is not None and constraint.masks([a]) == [None, None]


def test_only_end_tokens_follow_a_complete_answer() -> None:
    constraint = Constraint(compiler(), Grammar(kind="regex", text="ab"), None)
    constraint.advance(ids("ab"))
    assert allowed(constraint.masks([])[0]) == {EOS}
    constraint.advance([EOS, EOS])
    assert constraint.error is None and allowed(constraint.masks([])[0]) == {EOS}


@pytest.mark.parametrize("grammar", ["a(b", "(?=x)a", "(a"])
def test_bad_grammars_are_refused(grammar: str) -> None:
    with pytest.raises(InvalidRequest):
        Constraint(compiler(), Grammar(kind="regex", text=grammar), None)


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize("is_open", [True, False])
def test_the_grammar_begins_after_the_reasoning(is_open: bool) -> None:
    constraint = Constraint(compiler(), COLOUR, thinking(is_open=is_open))
    if not is_open:
        assert allowed(constraint.masks([])[0]) == {THINK, *(ids(x)[0] for x in "rgd")}
        constraint.advance([THINK])
    assert constraint.masks(ids("so"))[0] is None
    constraint.advance(ids("so, {red} "))
    masks = constraint.masks([ids("x")[0], THINK_END, ids("g")[0]])
    assert masks[0] is masks[1] is None
    assert allowed(masks[2]) == {ids(x)[0] for x in "rgd"} and allowed(masks[3]) == {ids("r")[0]}
    constraint.advance([THINK_END, *ids("red")])
    assert constraint.error is None and EOS in allowed(constraint.masks([])[0])


def test_reasoning_may_be_left_out() -> None:
    constraint = Constraint(compiler(), COLOUR, thinking(is_open=False))
    constraint.advance(ids("green"))
    assert constraint.error is None and EOS in allowed(constraint.masks([])[0])


def test_a_spent_budget_writes_the_end_marker_at_drafted_positions_too() -> None:
    constraint = Constraint(compiler(), COLOUR, thinking(is_open=True, budget=3))
    x, r = ids("xr")
    masks = constraint.masks([x, x, x, THINK_END, r])
    assert masks[:3] == [None] * 3 and allowed(masks[3]) == {THINK_END}
    assert allowed(masks[4]) == {ids(c)[0] for c in "rgd"}
    masks = constraint.masks([x, x, x, x, x])
    assert allowed(masks[3]) == {THINK_END} and masks[4:] == [None, None]


def test_a_marker_never_breaks_a_character() -> None:
    constraint = Constraint(compiler(), None, thinking(is_open=True, budget=3))
    bytes_of_it = ids("é世")
    assert len(bytes_of_it) == 5
    constraint.advance(bytes_of_it[:3])
    assert constraint.masks([])[0] is None, "the third byte begins a character"
    constraint.advance(bytes_of_it[3:])
    assert allowed(constraint.masks([])[0]) == {THINK_END}


def test_markers_of_several_tokens() -> None:
    marks = thinking(is_open=False, budget=1)
    marks = type(marks)(start="[T]", end="[/T]", start_token_ids=ids("[T]"), end_token_ids=ids("[/T]"), budget=1)
    constraint = Constraint(compiler(), COLOUR, marks)
    assert ids("[")[0] in allowed(constraint.masks([])[0])
    constraint.advance(ids("["))
    assert allowed(constraint.masks([])[0]) == set(ids("T"))
    constraint.advance(ids("T]x"))
    for token in ids("[/T]"):
        assert allowed(constraint.masks([])[0]) == {token}
        constraint.advance([token])
    assert allowed(constraint.masks([])[0]) == {ids(c)[0] for c in "rgd"}
    wants_bracket = Constraint(compiler(), Grammar(kind="regex", text=r"\[a\]"), marks)
    wants_bracket.advance(ids("[a]"))
    assert wants_bracket.error is None, "a marker that the grammar could begin with is not offered"


@pytest.mark.parametrize("k", [None, 4])
def test_budgets_hold_in_a_batch_with_and_without_drafts(k: int | None) -> None:
    budgets = {"b0": 0, "b1": 1, "b7": 7, "b20": 20, "none": None}
    plain = run_budgets(GrammarRig(), budgets)
    truth = {name: [*GrammarRig.PROMPT, *tokens] for name, tokens in plain.items()}
    if k is not None:
        drafter = ForcedDrafts(truth, dict.fromkeys(truth, 0.7))
        assert run_budgets(GrammarRig(drafter, k=k), budgets) == plain
        assert run_budgets(GrammarRig(k=k, ngram=True), budgets) == plain
    for name, budget in budgets.items():
        if budget is None:
            continue
        tokens = plain[name]
        end = tokens.index(THINK_END)
        assert end <= budget + 3, "up to three bytes complete a character"
        assert re.fullmatch("(red|green|dark blue)( sky)?", text_of(tokens[end + 1 :]))


def run_budgets(rig: GrammarRig, budgets: dict[str, int | None]) -> dict[str, list[int]]:
    for i, (name, budget) in enumerate(budgets.items()):
        wish = thinking(is_open=True, budget=budget)
        rig.ask(name, COLOUR, 60, SamplingParams(temperature=1.0, seed=i, is_seeded=True), thinking=wish)
    rig.drain()
    return {name: rig.tokens(name) for name in budgets}


def test_a_budget_without_a_grammar() -> None:
    rig = GrammarRig()
    rig.ask("open", None, 30, HOT, thinking=thinking(is_open=True, budget=4))
    constraint = Constraint(compiler(), None, thinking(is_open=False, budget=2))
    constraint.advance([ids("\n")[0], THINK, *ids("xx")])
    assert allowed(constraint.masks([])[0]) == {THINK_END}
    other = Constraint(compiler(), None, thinking(is_open=False, budget=2))
    other.advance(ids("no reasoning at all"))
    assert other.masks([])[0] is None
    rig.drain()
    tokens = rig.tokens("open")
    assert THINK_END in tokens[4:8]
