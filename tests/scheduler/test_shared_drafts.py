"""Drafts out of recent outputs: those of the same tenant, and of nobody else."""

from __future__ import annotations

from scheduler.speculation import SHARED_TOKENS
from tests.scheduler.test_core import Rig
from tests.support.fake_target import greedy, worker_info

VOCAB = 1000  # so that a sequence seldom repeats itself
PROMPT = [5, 6, 7]
LENGTH = 40


def rig_with(k: int = 4) -> Rig:
    rig = Rig(worker_info(vocab_size=VOCAB, max_draft_tokens=k), ngram=True, draft_block_size=k)
    rig.start_target()
    rig.core.speculator.forced_k = k
    return rig


def run(rig: Rig, name: str, tenant: str) -> int:
    """Steps that a request took."""
    before = rig.session._num_steps
    rig.submit(name, PROMPT, LENGTH, tenant=tenant)
    while rig.work():
        pass
    assert rig.tokens(name) == greedy(PROMPT, LENGTH, VOCAB)
    return rig.session._num_steps - before


def accepted(rig: Rig, source: str) -> float:
    name = "vllm:spec_decode_num_accepted_tokens_total"
    lines = rig.core.metrics.page().decode().splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith(name + "{") and f'drafter="{source}"' in x)


def test_a_request_drafts_from_what_its_tenant_has_had_before_and_it_is_counted_by_source() -> None:
    rig = rig_with()
    assert accepted(rig, "suffix") == 0
    first = run(rig, "a", "one")
    assert accepted(rig, "suffix") == 0
    assert run(rig, "b", "one") < first / 2
    assert accepted(rig, "suffix") > LENGTH / 2
    assert accepted(rig, "ngram") < LENGTH / 4


def test_a_request_sees_nothing_of_another_tenants_outputs() -> None:
    rig = rig_with()
    first = run(rig, "a", "one")
    assert run(rig, "b", "two") == first
    assert run(rig, "c", "") == first
    assert accepted(rig, "suffix") == 0


def test_the_outputs_of_ended_requests_are_remembered_within_a_bound() -> None:
    rig = rig_with()
    shared = rig.core.speculator._shared
    for i in range(5):
        run(rig, f"r{i}", "one")
    shared.check_integrity()
    assert shared.num_tokens == 5 * LENGTH
    assert shared._max_tokens == SHARED_TOKENS
