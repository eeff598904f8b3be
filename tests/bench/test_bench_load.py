"""The load client against a scripted server: what is timed, what is counted, what is an error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from bench.load import Played, Record, Target, play, summarize
from bench.serve import main as serve_main
from bench.workloads import Prompt
from tests.bench.fake_server import STREAM_HEAD, Answer, Write, delta, event, serve, status, usage

DONE = b"data: [DONE]\n\n"


def prompts(number: int, **changes: Any) -> list[Prompt]:
    return [
        Prompt(**{"index": i, "text": f"text {i}", "num_tokens": 2, "max_tokens": 4} | changes) for i in range(number)
    ]


def play_against(answer: Answer, number: int = 1, concurrency: int = 1, **changes: Any) -> Played:
    async def run() -> Played:
        async with serve(answer) as url:
            return await play(Target(url=url, **changes), prompts(number), concurrency)

    return asyncio.run(asyncio.wait_for(run(), 30))


async def two_chunks(body: dict[str, Any], write: Write) -> None:
    """A role, two chunks of text (of more tokens than chunks), an end, the usage."""
    await write(STREAM_HEAD + b": keepalive 1/2\n\n" + delta(None))
    await write(delta("one two"))
    await asyncio.sleep(0.05)  # the gap that the client must see
    await write(delta(" three") + delta("", "length") + usage(7, 5, cached=3) + DONE)


def test_tokens_come_from_usage_and_not_from_chunks() -> None:
    (record,) = play_against(two_chunks).records
    assert record.error is None
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 5, 3)
    assert len(record.chunk_s) == 2
    assert record.finish_reason == "length"


def test_role_and_keepalive_are_not_the_first_token() -> None:
    async def late_text(body: dict[str, Any], write: Write) -> None:
        await write(STREAM_HEAD + b": keepalive\n\n" + delta(None))
        await asyncio.sleep(0.1)
        await write(delta("text", "stop") + usage(1, 1) + DONE)

    (record,) = play_against(late_text).records
    assert record.ttft_s is not None
    assert record.ttft_s >= 0.1


def test_itl_is_the_gap_between_chunks_and_tpot_divides_by_tokens() -> None:
    (record,) = play_against(two_chunks).records
    (gap,) = record.itl_s
    assert gap >= 0.05
    assert record.tpot_s == pytest.approx((record.end_s - record.chunk_s[0]) / 4)
    assert record.end_s >= record.chunk_s[1] >= record.chunk_s[0] > 0


def test_events_split_over_network_reads_are_joined() -> None:
    async def in_pieces(body: dict[str, Any], write: Write) -> None:
        whole = delta("héllo") + delta("", "stop") + usage(1, 1) + DONE
        await write(STREAM_HEAD)
        for start in range(0, len(whole), 7):
            await write(whole[start : start + 7])
            await asyncio.sleep(0)

    (record,) = play_against(in_pieces).records
    assert (record.error, record.finish_reason, len(record.chunk_s)) == (None, "stop", 1)


def test_a_stream_without_usage_gives_no_token_rate() -> None:
    async def no_usage(body: dict[str, Any], write: Write) -> None:
        await write(STREAM_HEAD + delta("a") + delta("b", "stop") + DONE)

    summary = summarize(play_against(no_usage), 1)
    assert summary["num_without_usage"] == 1
    assert summary["output_tokens_per_s"] is None
    assert summary["num_errors"] == 0


@pytest.mark.parametrize(
    ("answer_bytes", "expected_status", "words"),
    [
        (status(429, "queue full"), 429, "queue full"),
        (STREAM_HEAD + event({"error": {"message": "no memory"}}), 200, "no memory"),
        (STREAM_HEAD + delta("a"), 200, "without a finish reason and without [DONE]"),
        (STREAM_HEAD + b"data: {broken\n\n", 200, "JSONDecodeError"),
        (STREAM_HEAD + b"data: " + b"x" * (2 << 20), 200, "an event of more than"),
        (b"", None, "RemoteProtocolError"),
    ],
)
def test_every_failure_is_counted_with_its_reason(answer_bytes: bytes, expected_status: int | None, words: str) -> None:
    async def fail(body: dict[str, Any], write: Write) -> None:
        await write(answer_bytes)

    played = play_against(fail, number=3, concurrency=2)
    summary = summarize(played, 2)
    assert summary["num_errors"] == summary["num_requests"] == 3
    assert all(r.status == expected_status and words in (r.error or "") for r in played.records)
    assert sum(summary["errors"].values()) == 3


def test_a_silent_server_ends_the_request_at_its_time_limit() -> None:
    async def silent(body: dict[str, Any], write: Write) -> None:
        await write(STREAM_HEAD + delta("a"))
        await asyncio.sleep(5)

    (record,) = play_against(silent, timeout_s=0.2).records
    assert record.error == "no end after 0.2 s"
    assert record.end_s == pytest.approx(0.2, abs=1)


def test_closed_loop_keeps_exactly_concurrency_requests_under_way() -> None:
    running: set[str] = set()
    seen: list[int] = []

    async def answer(body: dict[str, Any], write: Write) -> None:
        name = body["messages"][0]["content"]
        running.add(name)
        seen.append(len(running))
        await asyncio.sleep(0.02)
        running.remove(name)
        await write(STREAM_HEAD + delta("a", "stop") + usage(1, 1) + DONE)

    played = play_against(answer, number=12, concurrency=3)
    assert [r.index for r in played.records] == list(range(12))
    assert max(seen) == 3


def test_open_loop_sends_at_arrival_times_without_waiting_for_answers() -> None:
    release = asyncio.Event()
    running = 0

    async def answer(body: dict[str, Any], write: Write) -> None:
        nonlocal running
        running += 1
        if running == 4:  # answered only when all have come: a closed loop of 1 would wait for ever
            release.set()
        await release.wait()
        await write(STREAM_HEAD + delta("a", "stop") + usage(1, 1) + DONE)

    async def run() -> Played:
        async with serve(answer) as url:
            loads = [Prompt(index=i, text="t", num_tokens=1, max_tokens=1, arrival_s=0.02 * i) for i in range(4)]
            return await play(Target(url=url, timeout_s=20), loads, concurrency=1)

    played = asyncio.run(asyncio.wait_for(run(), 30))
    assert all(r.error is None and r.start_s >= 0.02 * r.index for r in played.records)


def test_body_has_only_what_was_asked_for() -> None:
    prompt = prompts(1)[0]
    plain = Target(url="").body(prompt)
    assert plain["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in plain
    assert "seed" not in plain
    asked = Target(url="", endpoint="completions", ignore_eos=True, seed=3, extra_body={"top_k": 5}).body(prompt)
    assert (asked["prompt"], asked["ignore_eos"], asked["seed"], asked["top_k"]) == ("text 0", True, 3, 5)


def test_throughput_spans_first_send_to_last_end() -> None:
    records = [
        Record(
            index=0, start_s=1.0, chunk_s=[0.5], end_s=2.0, completion_tokens=10, prompt_tokens=4, finish_reason="stop"
        ),
        Record(
            index=1, start_s=2.0, chunk_s=[0.5], end_s=4.0, completion_tokens=30, prompt_tokens=6, finish_reason="stop"
        ),
    ]
    summary = summarize(Played(records=records, wall_s=5.0), 2)
    assert (summary["output_tokens_per_s"], summary["total_tokens_per_s"]) == (8.0, 10.0)


def test_serve_command_prints_a_table_and_one_json_object_last(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    async def run() -> int:
        async with serve(two_chunks) as url:
            options = ["--url", url, "--num-requests", "3", "--concurrency", "2", "--tokenizer", str(tmp_path)]
            options += ["--json", str(tmp_path / "out.json"), "--warmup", "1"]
            return await asyncio.to_thread(serve_main, options)

    write_word_tokenizer(tmp_path)
    assert asyncio.run(asyncio.wait_for(run(), 60)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["|", "|", "p50", "|", "p90", "|", "p99", "|"]
    last = json.loads(lines[-1])
    assert last["runs"][0]["output_tokens"] == 15
    assert last["runs"][0]["finish_reasons"] == {"length": 3}
    assert len(json.loads((tmp_path / "out.json").read_text())["records"][0]) == 3


def write_word_tokenizer(folder: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
