"""A target that falls ill at a known place: over a poison request, in an endless step, amid a prompt or a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults import sick_target
from tests.faults.apart import Apart
from tests.faults.load import Load, check_nothing_leaked
from tests.faults.test_kills import IS_LONG
from tests.support.stream import BODY, Stream

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

WAIT_S = 120.0
NUM_ATTEMPTS = 2  # as docs/operations.md says
CHUNK = 64  # tokens, here characters, of a step
STEP_TIMEOUT_S = 8.0
LONG_PROMPT = "a long prompt " * 20 + "{word} " * 20  # 8 chunks or so; the word stands in the later ones
WORDS = " ".join(f"{i} bottles of beer" for i in range(16))

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    folder = tmp_path_factory.mktemp("sick")
    running = Apart(
        model, folder, {"target": "tests.faults.sick_target"}, max_num_seqs=16, step_timeout_s=STEP_TIMEOUT_S,
        max_num_batched_tokens=CHUNK,
    )  # fmt: skip
    running.environment[sick_target.FOLDER] = str(folder)
    with running:
        yield running


def folder_of(server: Apart) -> Path:
    return Path(server.environment[sick_target.FOLDER])


def clear_cache(server: Apart) -> None:
    httpx.delete(f"{server.url}/v1/cache", timeout=WAIT_S).raise_for_status()


@pytest.mark.parametrize("word", list(sick_target.ALWAYS))
def test_a_poison_request_ends_alone_after_two_attempts(server: Apart, word: str, record_property: Record) -> None:
    with Load(server, 4) as load:
        load.wait_progress()
        started = time.monotonic()
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY | {"prompt": word}, timeout=WAIT_S)
        record_property("answered_after_s", time.monotonic() - started)
        load.wait_progress()
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert error["code"] == "poison_request" and "given up" in error["message"]
    assert answer.headers["x-should-retry"] == "false", "clients would send it again"
    assert len(sick_target.faults(folder_of(server), word)) == NUM_ATTEMPTS
    load.check(4)
    check_nothing_leaked(server)


def test_a_step_that_does_not_end_is_replaced_though_heartbeats_go_on(server: Apart, record_property: Record) -> None:
    expected = Stream(server, prompt="HANG", logprobs=1)
    expected.result()
    with Load(server, 4) as load:
        load.wait_progress()
        before = server.worker("tests.faults.sick_target")
        sick_target.arm(folder_of(server), "HANG")
        stream = Stream(server, prompt="HANG", logprobs=1)
        server.wait_for(lambda: sick_target.faults(folder_of(server), "HANG"), "the step hangs")
        hung = time.monotonic()
        server.wait_for(lambda: not before.is_running(), "replaced", WAIT_S)
        load.wait_progress()
        record_property("recovery_s", time.monotonic() - hung)
        stream.result()
    assert stream.tokens == expected.tokens
    log = server.log.read_text()
    assert "a step does not end; killing process" in log
    assert "hangs; killing it" not in log, "its heartbeats had ended too"
    load.check(4)
    check_nothing_leaked(server)


def test_a_kill_amid_the_prefill_of_a_long_prompt_changes_no_token(server: Apart, record_property: Record) -> None:
    prompt = LONG_PROMPT.format(word="KILL")
    expected = Stream(server, prompt=prompt, max_tokens=60, logprobs=1)
    expected.result()
    with Load(server, 4) as load:
        load.wait_progress()
        clear_cache(server)
        sick_target.arm(folder_of(server), "KILL")
        started = time.monotonic()
        stream = Stream(server, prompt=prompt, max_tokens=60, logprobs=1)
        stream.result()
        record_property("whole_answer_s", time.monotonic() - started)
    (start,) = sick_target.faults(folder_of(server), "KILL")
    assert start >= CHUNK, "the first chunk: nothing of the prompt was computed yet"
    assert stream.tokens == expected.tokens
    load.check(4)
    check_nothing_leaked(server)


def test_a_kill_amid_the_write_of_a_block_costs_that_block_alone(server: Apart) -> None:
    """What was written before is read again, the torn file never, and the block is written at its next turn."""

    def ask(prompt: str) -> tuple[str, int]:
        answer = httpx.post(
            f"{server.url}/v1/completions", json=BODY | {"prompt": prompt, "max_tokens": 12}, timeout=WAIT_S
        )
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]["prompt_tokens_details"]
        return answer.json()["choices"][0]["text"], usage["cached_tokens"]

    def files() -> list[Path]:
        return [p for p in Path(server.environment["TANDEM_PREFIX_DIR"]).rglob("*") if p.is_file()]

    def num_on_ssd() -> float:
        return server.metric("tandem:prefix_blocks", tier="ssd")

    def restarts() -> float:
        return server.metric("tandem:worker_restarts_total", role="target")

    longer = WORDS + " and so on" * 8
    clear_cache(server)
    expected_longer = ask(longer)[0]
    clear_cache(server)
    expected = ask(WORDS)[0]
    num_whole = len(WORDS) // 32
    server.wait_for(lambda: num_on_ssd() >= num_whole, "written to SSD")
    before, num_restarts = server.worker("tests.faults.sick_target"), restarts()
    sick_target.arm(folder_of(server), sick_target.WRITE)
    assert ask(longer)[0] == expected_longer  # its new blocks are written afterwards, the first of them half
    server.wait_for(lambda: not before.is_running(), "killed amid a write")
    server.wait_for(lambda: restarts() > num_restarts, "a new target")  # until then the old one counts as ready
    server.wait_ready()
    assert len(sick_target.faults(folder_of(server), sick_target.WRITE)) == 1
    assert not [p for p in files() if p.name.startswith(".")], "the torn file is left over"
    assert ask(longer)[0] == expected_longer
    server.wait_for(lambda: num_on_ssd() >= len(longer) // 32, "the block that was lost is written")
    server.worker("tests.faults.sick_target").kill()  # and its device's blocks with it
    server.wait_for(lambda: restarts() > num_restarts + 1, "another target")
    server.wait_ready()
    server.wait_for(lambda: num_on_ssd() >= len(longer) // 32, "the files found")
    hits = server.metric("tandem:prefix_hit_tokens_total", tier="archive")
    text, num_cached = ask(longer)
    assert text == expected_longer
    assert num_cached >= 32 * (len(longer) // 32 - 1)
    assert server.metric("tandem:prefix_hit_tokens_total", tier="archive") - hits == num_cached
    assert ask(WORDS)[0] == expected
    assert server.metric("tandem:prefix_archive_errors_total") == 0
    check_nothing_leaked(server)
