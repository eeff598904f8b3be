"""Outputs of a random model at a high temperature always match their schema, in a batch, with and without drafts."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from shared.messages import Grammar, SamplingParams
from tests.support.engine_rig import ForcedDrafts
from tests.support.grammar_rig import GrammarRig, ids, tokenizer
from tests.workers.json_schemas import SCHEMAS

pytestmark = pytest.mark.mlx

BATCH = 8
MAX_TOKENS = 900
BATCHES = [SCHEMAS[i : i + BATCH] for i in range(0, len(SCHEMAS), BATCH)]

SPARE_SPACES = dict.fromkeys((*ids(" \n\r\t"), tokenizer().token_to_id("  ")), -4.0)
# Without "time": the package knows no time zones, which RFC 3339 asks for.
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid"])


def run(schemas: list[dict[str, Any]], seed: int, rig: GrammarRig) -> dict[str, list[int]]:
    names = [f"s{i}" for i in range(len(schemas))]
    for i, (name, schema) in enumerate(zip(names, schemas, strict=True)):
        spaces = {} if seed % 200 == 0 else SPARE_SPACES  # every other batch writes as much space as it is allowed to
        sampling = SamplingParams(temperature=1.5, seed=seed + i, is_seeded=True, logit_bias=spaces)
        rig.ask(name, Grammar(kind="json_schema", text=json.dumps(schema)), MAX_TOKENS, sampling)
    rig.drain()
    for name, schema in zip(names, schemas, strict=True):
        text = rig.text(name)
        assert rig.reason(name) == "stop", (schema, text, rig.outputs[name][-1].error)
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
        validator.validate(json.loads(text))
    return {name: rig.tokens(name) for name in names}


def test_there_are_enough_schemas() -> None:
    assert len({json.dumps(schema) for schema in SCHEMAS}) >= 150
    for schema in SCHEMAS:
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("first", range(len(BATCHES)))
def test_output_matches_its_schema_with_and_without_drafts(first: int) -> None:
    schemas, seed = BATCHES[first], 100 * first
    plain = run(schemas, seed, GrammarRig())
    if first % 4 == 0:
        assert run(schemas, seed, GrammarRig(k=4, ngram=True)) == plain
    truth = {name: [*GrammarRig.PROMPT, *tokens] for name, tokens in plain.items()}
    drafter = ForcedDrafts(truth, {name: 0.3 + 0.1 * i for i, name in enumerate(truth)})
    drafted = GrammarRig(drafter, k=4)
    assert run(schemas, seed, drafted) == plain
    num_drafted, num_accepted = drafted.counts(list(truth))
    assert 0 < num_accepted < num_drafted or num_drafted < 20
