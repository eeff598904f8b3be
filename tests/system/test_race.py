"""`tandem race` from a shell: two servers, one report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tandem import race
from tests.support.server import REPOSITORY
from tests.support.terminal import Terminal

pytestmark = [pytest.mark.system, pytest.mark.mlx]


def tandem_race(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TANDEM_BLAS_THREADS": "1", "TANDEM_DRAFT_TOKENS": "4"}
    return subprocess.run(
        [sys.executable, "-m", "tandem", "race", *arguments], env=environment, cwd=REPOSITORY, capture_output=True,
        text=True, timeout=150, check=False,
    )  # fmt: skip


def test_a_race_tells_parity_acceptance_and_speed(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two one two one two\n\nx\n")
    done = tandem_race(
        "--model", str(model), "--draft-model", "ngram", "--prompts", str(prompts), "--max-tokens", "24", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    plain, drafted = result["arms"]
    assert (result["num_prompts"], result["num_equal_texts"]) == (2, 2)
    assert result["first_differences"] == [None, None]
    assert (plain["drafter"], plain["num_drafts"], plain["accepted_at"]) == ("none", 0, [])
    assert drafted["num_draft_tokens"] >= drafted["num_drafts"] > 0
    assert drafted["num_accepted_tokens"] <= drafted["num_draft_tokens"]
    assert [a["text"] for a in plain["answers"]] == [a["text"] for a in drafted["answers"]]
    assert result["speed_up"] == pytest.approx(drafted["tokens_per_s"] / plain["tokens_per_s"])
    assert "equal texts: 2 of 2" in race.report(result)


def test_a_model_that_does_not_exist_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    done = tandem_race("--model", str(tmp_path / "nothing"), "--draft-model", "ngram")
    assert done.returncode == 1
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_in_the_middle_of_a_race_ends_its_server(model: Path, tmp_path: Path) -> None:
    with Terminal(tmp_path, "race", "--model", str(model), "--draft-model", "ngram") as running:
        running.expect("plain: starting")
        tree = []
        while len(tree) < 5:  # honcho and what it starts
            tree = psutil.Process(running.child.pid).children(recursive=True)
            time.sleep(0.05)
        running.ctrl_c()
        code, said = running.end()
    assert code == 130
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("arguments", "named"), [(("--max-tokens", "1"), "--max-tokens"), (("--prompts", "/no/such/file"), "/no/such/file")]
)
def test_bad_options_start_nothing(arguments: tuple[str, ...], named: str) -> None:
    done = tandem_race("--draft-model", "ngram", *arguments)
    assert done.returncode != 0
    assert named in done.stderr


def test_a_report_names_the_prompts_that_differ() -> None:
    arm = {
        "drafter": "d", "tokens_per_s": 2.0, "num_draft_tokens": 4, "num_accepted_tokens": 1, "accepted_at": [0.5, 0.25]
    }  # fmt: skip
    result = {
        "model": "m", "num_prompts": 2, "num_equal_texts": 1, "first_differences": [None, 7], "speed_up": 1.5,
        "arms": [arm],
    }  # fmt: skip
    text = race.report(result)
    assert "0.50 0.25" in text
    assert "prompt 2 differs from character 7" in text
