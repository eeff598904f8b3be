"""The drafter benchmark: order of play, what is compared with what, ties, tables; against scripted servers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import httpx
import pytest

from bench import draft_tables, drafters, prompt_sets
from bench.draft_arms import Arm, Running, Servers, parse_arms, parse_urls
from bench.drafters import main, turns
from bench.load import Target
from bench.parity import judge
from bench.workloads import Prompt
from tests.bench.fake_server import STREAM_HEAD, Write, delta, page, serve, usage

ARMS = [Arm(name="none"), Arm(name="a"), Arm(name="b")]
CELLS = [("chat", 1), ("math", 1)]


# ------------------------------------------------ what is played


@pytest.mark.parametrize("varies", [False, True])
def test_answers_are_as_long_for_every_arm(varies: bool) -> None:
    options = ["--output-tokens", "100", *(["--vary-output"] if varies else [])]
    args = drafters._parser().parse_args([*options, "--requests-per-cell", "40", "--workloads", "chat"])
    bench = drafters.Bench(args, cast(Any, None), cast(Any, None))
    lengths = [
        [p.max_tokens for p in bench.prompts(drafters.Turn(0, "chat", 8, Arm(name=name)))] for name in ("none", "ngram")
    ]
    assert lengths[0] == lengths[1]
    assert (min(lengths[0]) < 70 and max(lengths[0]) > 130) if varies else set(lengths[0]) == {100}
    assert all(50 <= n <= 150 for n in lengths[0])


@pytest.mark.parametrize("is_interleaved", [True, False])
def test_every_arm_plays_every_cell_once_a_repeat(is_interleaved: bool) -> None:
    played = Counter(turn.key for turn in turns(ARMS, CELLS, 2, is_interleaved))
    assert len(played) == 12 and set(played.values()) == {1}


def test_interleaved_arms_begin_in_turn() -> None:
    order = list(turns(ARMS, CELLS, 2, True))
    groups = [order[i : i + 3] for i in range(0, 12, 3)]
    assert all(len({(t.repeat, t.workload, t.concurrency) for t in group}) == 1 for group in groups)
    assert [group[0].arm.name for group in groups] == ["none", "a", "b", "none"]


def test_one_server_at_a_time_is_changed_once_an_arm_and_repeat() -> None:
    names = [turn.arm.name for turn in turns(ARMS, CELLS, 2, False)]
    assert names == ["none"] * 2 + ["a"] * 2 + ["b"] * 2 + ["a"] * 2 + ["b"] * 2 + ["none"] * 2


def test_arms_are_names_checkpoints_and_forced_lengths() -> None:
    assert parse_arms("none,null,ngram@4,mine=/a=b/c@7") == [
        Arm(name="none", draft_model="none"),
        Arm(name="null", draft_model="none"),
        Arm(name="ngram", draft_model="ngram", draft_tokens=4),
        Arm(name="mine", draft_model="/a=b/c", draft_tokens=7),
    ]
    assert parse_urls(["http://x/v1"]) == [Arm(name="server", url="http://x")]
    for wrong in ("none,none", "a=/b@x", ",", "=x"):
        with pytest.raises(ValueError):
            parse_arms(wrong)
    with pytest.raises(ValueError, match="NAME=URL"):
        parse_urls(["localhost:80"])


@pytest.mark.parametrize("workload", prompt_sets.WORKLOADS)
def test_prompt_sets_have_forty_different_prompts(workload: str) -> None:
    texts = prompt_sets.read(workload)
    assert len(texts) >= 40
    assert len(set(texts)) == len(texts)
    assert all(3 < len(text.split()) < 200 for text in texts)


def test_a_prompt_that_comes_again_belongs_to_another_tenant() -> None:
    picked = prompt_sets.pick(["x", "y"], 5, 8, "cell", first=1)
    assert [p.text for p in picked] == ["y", "x", "y", "x", "y"]
    assert len({(p.text, p.headers["X-Cache-Tenant"]) for p in picked}) == 5


# ------------------------------------------------ ties


def entry(token: str, logprob: float, *others: tuple[str, float]) -> dict[str, Any]:
    listed = [(token, logprob), *others]
    top = [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in listed]
    return top[0] | {"top_logprobs": top}


def judged(entries: list[dict[str, Any]], plain: str, other: str) -> tuple[str, int, float | None]:
    body = {"choices": [{"logprobs": {"content": entries}}]}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=body))
    with httpx.Client(base_url="http://plain", transport=transport) as client:
        prompt = Prompt(index=0, text="q", num_tokens=1, max_tokens=8)
        found = judge(client, Target(url="http://plain"), prompt, plain, other, 0.25)
    return found.verdict, found.at_char, found.gap


AB = [entry("A ", -0.1), entry("cat", -0.7, ("car", -0.8), ("ca", -4.0))]


def test_nearly_equal_tokens_are_a_tie() -> None:
    assert judged(AB, "A cat sat", "A car sat") == ("tie", 4, pytest.approx(0.1))


def test_the_plain_server_may_fall_the_other_way_this_time() -> None:
    assert judged(AB, "A car sat", "A cat sat") == ("tie", 4, pytest.approx(0.1))


def test_a_clearly_worse_token_is_no_tie() -> None:
    assert judged([entry("A ", -0.1), entry("cat", -0.2, ("dog", -2.2))], "A cat", "A dog")[::2] == (
        "other",
        pytest.approx(2.0),
    )


def test_ending_or_going_on_can_be_a_tie() -> None:
    entries = [entry("Yes", -0.1), entry("<|im_end|>", -0.7, (".", -0.75))]
    assert judged(entries, "Yes", "Yes.")[0] == "tie"


@pytest.mark.parametrize(
    "entries",
    [
        [entry("A ", -0.1), entry("cat", -0.1, ("cow", -3.0))],  # the other token is not among those listed
        [entry("The ", -0.6, ("A ", -0.7)), entry("end", -0.1)],  # it parted before
        [entry("A ", -0.1)],  # it ended before
    ],
)
def test_what_cannot_be_told_is_unresolved(entries: list[dict[str, Any]]) -> None:
    assert judged(entries, "A cat", "A dog")[0] == "unresolved"


# ------------------------------------------------ against servers that run already


class Scripted:
    """A server that answers with its `texts` in turn of the prompts and counts drafts of `accepted` tokens."""

    def __init__(self, suffix: str, accepted: int) -> None:
        self.suffix, self.accepted = suffix, accepted
        self.num_asked = 0

    async def answer(self, body: dict[str, Any], write: Write) -> None:
        if body.get("logprobs"):
            content = [entry("same", -0.1), entry(" one", -0.69, (" two", -0.70))]
            await write(page(json.dumps({"choices": [{"logprobs": {"content": content}}]})))
            return
        self.num_asked += 1
        await write(STREAM_HEAD + delta("same") + delta(self.suffix) + delta("", "stop") + usage(3, 2))

    def metrics(self) -> str:
        lines = [
            f"vllm:spec_decode_num_drafts_total {self.num_asked * bool(self.accepted)}",
            f"vllm:spec_decode_num_draft_tokens_total {2 * self.num_asked * bool(self.accepted)}",
            f"vllm:spec_decode_num_accepted_tokens_total {self.num_asked * self.accepted}",
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {self.num_asked * self.accepted}',
        ]
        return "\n".join(lines)


def play_scripted(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    plain, fast = Scripted(" one", 0), Scripted(" two", 1)

    async def run() -> int:
        async with (
            serve(plain.answer, {"/metrics": plain.metrics}) as one,
            serve(fast.answer, {"/metrics": fast.metrics}) as two,
        ):
            arguments = ["--url", f"none={one}", "--url", f"fast={two}", "--workloads", "chat,math", "--concurrency"]
            arguments += ["1,2", "--requests-per-cell", "2", "--output", str(folder / "drafters.json"), *options]
            return await asyncio.to_thread(main, arguments)

    code = asyncio.run(asyncio.wait_for(run(), 60))
    return code, json.loads((folder / "drafters.json").read_text())


def test_two_servers_are_compared_cell_by_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = play_scripted(tmp_path, "--repeats", "2")
    assert code == 0
    assert len(result["cells"]) == 2 * 2 * 2 * 2 and not result["left_out"]
    fast = [c for c in result["cells"] if c["arm"] == "fast"]
    assert all(c["speculation"]["mean_acceptance_length"] == 2.0 for c in fast)
    assert all(c["parity"] == {"compared": 2, "identical": 0, "tie": 2} for c in fast)
    assert result["overview"]["parity"]["fast"]["tie"] == 16
    assert result["overview"]["mean_acceptance_length"] == {
        "none": {"chat": None, "math": None},
        "fast": {"chat": 2.0, "math": 2.0},
    }
    assert set(result["overview"]["speed_up"]["fast"]) == {"1", "2"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["overview"] == result["overview"]
    assert "| fast |" in (tmp_path / "drafters.md").read_text()
    assert (tmp_path / "drafters-speedup.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "drafters-acceptance.png").read_bytes()
    (tmp_path / "drafters-acceptance.png").unlink()
    assert main(["--plot", str(tmp_path / "drafters.json")]) == 0
    assert (tmp_path / "drafters-acceptance.png").read_bytes() == drawn


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds."""
    monkeypatch.setattr(drafters, "_try_to_plot", lambda result, stem: None)


@pytest.mark.usefixtures("no_plots")
def test_a_text_that_differs_by_more_than_a_tie_fails_the_run(tmp_path: Path) -> None:
    code, result = play_scripted(tmp_path, "--repeats", "1", "--tie-bound", "0.001")
    assert code == 1
    assert {p["verdict"] for p in result["partings"]} == {"other"}


@pytest.mark.usefixtures("no_plots")
def test_cells_that_time_leaves_no_room_for_are_named(tmp_path: Path) -> None:
    code, result = play_scripted(tmp_path, "--repeats", "1", "--time-budget", "0")
    assert code == 0
    assert result["cells"] == []
    assert result["left_out"][0] == "0/chat/1/none" and len(result["left_out"]) == 8
    assert "8 cells were left out" in (tmp_path / "drafters.md").read_text()


@pytest.mark.usefixtures("no_plots")
def test_a_server_that_is_gone_fails_alone(tmp_path: Path) -> None:
    plain = Scripted(" one", 0)

    async def run() -> int:
        async with serve(plain.answer, {"/metrics": plain.metrics}) as url:
            arguments = ["--url", f"none={url}", "--url", "gone=http://127.0.0.1:9", "--workloads", "chat"]
            arguments += ["--concurrency", "1", "--repeats", "1", "--output", str(tmp_path / "d.json")]
            return await asyncio.to_thread(main, arguments)

    assert asyncio.run(asyncio.wait_for(run(), 60)) == 1
    result = json.loads((tmp_path / "d.json").read_text())
    assert [c["arm"] for c in result["cells"]] == ["none"]
    assert "ConnectError" in result["failed"]["gone"]


def test_an_arm_that_does_not_start_is_told_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(self: Servers, arm: Arm, stack: ExitStack) -> Running:
        started.append(arm.name)
        if arm.name == "b":
            raise RuntimeError("no such checkpoint")
        return Running(arm, Target(url="http://x"), {})

    monkeypatch.setattr(Servers, "_open", start)
    arms = parse_arms("none,a=/a,b=/b")
    with TemporaryFile() as log, Servers("m", Target(url=""), {}, True, log) as servers:
        assert servers.start_all(arms) == {"b": "RuntimeError: no such checkpoint"}
        assert servers.get(arms[1]).arm == arms[1]
    assert started[0] == "a", "one that drafts measures the step costs, alone"
    assert sorted(started) == ["a", "b", "none"]


# ------------------------------------------------ figures


def cell(arm: str, rate: float, repeat: int = 0, **more: Any) -> dict[str, Any]:
    summary = {"output_tokens_per_s": rate, "output_tokens": 100}
    place = {"repeat": repeat, "workload": "chat", "concurrency": 1, "arm": arm, "speculation": None}
    return place | {"summary": summary} | more


def test_speed_ups_are_over_the_plain_arm_of_the_same_repeat() -> None:
    cells = [cell("none", 100), cell("x", 200), cell("none", 50, 1), cell("x", 50, 1), cell("x", 70, 2)]
    assert draft_tables.speed_ups(cells, "x") == [2.0, 1.0]
    assert draft_tables.mean_speed_up(cells, "x") == pytest.approx(2**0.5)
    assert draft_tables.mean_speed_up(cells, "y") is None


def test_noise_is_how_far_the_null_arm_is_from_the_plain_one() -> None:
    cells = [cell("none", 100), cell("null", 110), cell("none", 100, 1), cell("null", 96, 1)]
    assert draft_tables.noise(cells) == {"mean": pytest.approx(0.07), "max": pytest.approx(0.1), "count": 2}
    assert draft_tables.noise(cells[:1]) is None


def test_acceptance_weighs_each_draft_alike() -> None:
    def drafts(number: int, accepted: int, at: dict[str, int]) -> dict[str, Any]:
        return {"num_drafts": number, "num_accepted_tokens": accepted, "accepted_at": at}

    cells = [
        cell("x", 1, 0, speculation=drafts(10, 10, {"0": 6, "1": 4})),
        cell("x", 1, 1, speculation=drafts(30, 0, {"0": 0})),
    ]
    assert draft_tables.acceptance(cells, "x") == (pytest.approx(1.25), [pytest.approx(0.15), pytest.approx(0.1)])
    assert draft_tables.drafted_share(cells, "x") == pytest.approx(50 / 200)
