"""Speculation with a synthetic acceptance: a tiny Gemma 4, its random assistant, and the rows between them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from bench import synthetic
from bench.model_shapes import ASSISTANTS, assistant_config, random_model
from bench.synthetic import Loop
from bench.synthetic_drafters import Coin, RandomAssistant, WaitDrafter
from shared.messages import DraftReply, DraftRequest, FeatureRows, RequestId, WorkerInfo
from workers.drafters.gemma4_assistant import AssistantConfig, Gemma4Assistant
from workers.engine import Engine
from workers.features import Bits

pytestmark = pytest.mark.mlx

K = 3
PROMPT = 40  # beyond the window
BATCH = 3
NUM_TOKENS = 1 + 6 * (K + 1)  # the prompt's own token and six whole rounds


class Watched(RandomAssistant):
    """Remembers what it was given and asked, since the last `reset`."""

    def reset(self) -> None:
        super().reset()
        self.num_rows: dict[RequestId, int] = {}
        self.asked: list[int] = []  # tokens, of each row
        self._engine.take_features = self._take  # type: ignore[method-assign]

    def _take(self, rows: FeatureRows, array: Bits) -> None:
        assert rows.start == self.num_rows.get(rows.request_id, 0), "rows come in order, each once"
        assert array.shape[0] == rows.num_rows
        self.num_rows[rows.request_id] = rows.start + rows.num_rows
        type(self._engine).take_features(self._engine, rows, array)

    def draft(self, request: DraftRequest) -> DraftReply:
        for row in request.rows:
            assert self.num_rows[row.request_id] == row.start + len(row.token_ids) - 1, "one for each but the anchor"
        reply = super().draft(request)
        assert [len(d.token_ids) for d in reply.drafts] == [row.num_tokens for row in request.rows]
        self.asked += [row.num_tokens for row in request.rows]
        return reply


@pytest.fixture(scope="module")
def pair() -> tuple[Engine, WorkerInfo, Watched]:
    mx.random.seed(0)
    loaded = random_model("gemma4-tiny", "float32")
    engine, info = synthetic.speculating_engine(loaded)
    return engine, info, Watched("gemma4-tiny", loaded, engine)


def play(pair: tuple[Engine, WorkerInfo, Watched], chance: float) -> Loop:
    engine, info, drafter = pair
    engine.reset()
    engine.count_accepted = Coin(chance).count
    loop = Loop(engine, info, drafter, K)
    assert loop.run(BATCH, NUM_TOKENS, PROMPT, random.Random(1)) > 0
    return loop


def test_with_every_draft_accepted_a_round_commits_all_of_them(pair) -> None:
    loop = play(pair, 1.0)
    assert loop.committed == [[K + 1] * BATCH] * 4  # one round is the first row's alone, one takes the prompts in
    # In the first row's second round the others' prompts are taken in.
    assert pair[2].asked == [K, K, *[0] * (BATCH - 1), *[K] * (len(pair[2].asked) - BATCH - 1)]
    assert loop.phases["draft"] > 0 and loop.phases["features"] > 0


def test_with_no_draft_accepted_a_round_commits_one_token(pair) -> None:
    loop = play(pair, 0.0)
    assert loop.committed == [[1] * BATCH] * (NUM_TOKENS - 3)
    assert pair[2].asked[: BATCH * 6] == [K, K, *[0] * (BATCH - 1), *[K] * (BATCH * 5 - 1)]


def test_rows_accept_numbers_of_their_own_and_the_assistant_gets_what_they_committed(pair) -> None:
    loop = play(pair, 0.6)
    assert any(len(set(row)) > 1 for row in loop.committed), "ragged rounds"
    # Every token but the last one has been through the target, whoever drafted it.
    assert list(pair[2].num_rows.values()) == [PROMPT + NUM_TOKENS - 1] * BATCH


def test_a_wait_drafts_as_many(pair) -> None:
    engine, info, _ = pair
    engine.reset()
    engine.count_accepted = Coin(1.0).count
    loop = Loop(engine, info, WaitDrafter(0.002), K)
    loop.run(2, 1 + 4 * (K + 1), PROMPT)
    assert loop.committed == [[K + 1] * 2] * 2
    assert loop.num_steps == 2 and loop.s_per_step("draft") >= 0.002, "each step has its drafts"


def test_the_command_line_plays_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "REPEATS", 1)
    path = tmp_path / "result.json"
    arguments = ["--shape", "gemma4-tiny", "--dtype", "float32", "--batches", "1", "--acceptance", "1"]
    arguments += ["--output-tokens", "17", "--prompt-tokens", "16", "--drafter", "assistant", "--json", str(path)]
    assert synthetic.main(arguments) == 0
    result = json.loads(path.read_text())
    assert result["drafter"] == "assistant" and result["drafter_parameters"] > 10_000 and result["draft_ms"] is None
    (row,) = result["rows"]
    assert {k: row["tokens_per_row"][k] for k in "0137"} == {"0": 1.0, "1": 2.0, "3": 4.0, "7": 8.0}
    assert all(row["ms_per_step"][k]["draft"] > 0 for k in "137")


def test_an_assistant_needs_a_target_that_it_is_known_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        synthetic.main(["--shape", "8b", "--drafter", "assistant"])
    assert ", ".join(ASSISTANTS) in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "num_bytes"), [("gemma4-e4b", 159_138_208), ("gemma4-26b-a4b", 839_427_840)])
def test_assistants_are_as_large_as_the_published_files(shape: str, num_bytes: int) -> None:
    model = Gemma4Assistant(AssistantConfig.from_hf(assistant_config(shape)))  # nothing is evaluated
    sizes = [a.size * (2 if mx.issubdtype(a.dtype, mx.floating) else 8) for _, a in tree_flatten(model.parameters())]
    assert 0 < num_bytes - sum(sizes) < 8192, "the header"
