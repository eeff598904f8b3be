"""Several processes die at once: amid the prefill of a long prompt with an image, while images, tool calls, grammars
and seeds are answered; and what recovery takes from the SSD.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults import sick_drafter, sick_target
from tests.faults.apart import Apart
from tests.faults.load import Footprint, Load, check_nothing_leaked
from tests.faults.test_kills import IS_LONG, send
from tests.faults.test_kinds_in_flight import WAIT_S, Asking, ask, image
from tests.support import tiny_model
from tests.support.server import READY_S
from tests.support.stream import Stream

pytestmark = [pytest.mark.system, pytest.mark.mlx, pytest.mark.skipif(not IS_LONG, reason="make faults runs it")]

CHUNK = 64  # tokens, here characters, of a step
STEP_TIMEOUT_S = 4.0
TARGET, SCHEDULER, DRAFTER = "tests.faults.sick_target", "scheduler", "tests.faults.sick_drafter"
ALL = (TARGET, SCHEDULER, DRAFTER)
COMBINATIONS = [ALL, (SCHEDULER,), (DRAFTER,), (TARGET, DRAFTER), (SCHEDULER, TARGET), (SCHEDULER, DRAFTER)]
MAX_TRIES = 8


def long_question() -> dict[str, Any]:
    """A prompt of several chunks; the word over which the target stops is in none of the others."""
    text = {"type": "text", "text": "what is it, and what was it before? " * 4 + "STOP " * 8 + "and so on " * 8}
    return {"content": [image(9), text], "temperature": 1.2, "seed": 3, "ignore_eos": True, "max_tokens": 60}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """A tiny Qwen2-VL whose template knows tools, with a drafter that is asked in every step."""
    folder = tmp_path_factory.mktemp("together")
    model = tiny_model.write_qwen2_vl(folder / "tiny")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% if tools %}{{ tools | length }}{% endif %}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    drafter = tiny_model.write(folder / "drafter", more=tiny_model.VISION_TOKENS)
    running = Apart(
        model, folder, {"target": TARGET, "drafter": DRAFTER}, draft_model=drafter, draft_tokens=2, max_num_seqs=16,
        max_num_batched_tokens=CHUNK, tool_parser="hermes", max_early_deaths=1000, step_timeout_s=STEP_TIMEOUT_S,
        heartbeat_timeout_s=3,
    )  # fmt: skip
    running.environment[sick_target.FOLDER] = str(folder)
    with running:
        running.wait_for(lambda: running.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
        yield running


def folder_of(server: Apart) -> Path:
    return Path(server.environment[sick_target.FOLDER])


def clear_cache(server: Apart) -> None:
    httpx.delete(f"{server.url}/v1/cache", timeout=WAIT_S).raise_for_status()


@pytest.mark.parametrize("victims", COMBINATIONS, ids="-".join)
def test_deaths_amid_a_prefill_and_answers_of_every_kind_change_nothing(
    server: Apart, victims: tuple[str, ...]
) -> None:
    expected = ask(server, long_question())
    assert expected[0] == 200, expected
    before, num_stops = Footprint.of(server), len(sick_target.faults(folder_of(server), "STOP"))
    answers: list[object] = []
    with Asking(server) as asking:
        asking.wait_answers()
        clear_cache(server)
        sick_target.arm(folder_of(server), "STOP")
        question = threading.Thread(target=lambda: answers.append(ask(server, long_question())), daemon=True)
        question.start()
        server.wait_for(lambda: len(sick_target.faults(folder_of(server), "STOP")) > num_stops, "amid the prompt")
        stopped = server.worker(TARGET)
        for victim in victims:
            send(server, victim, signal.SIGKILL)
        if TARGET not in victims:
            stopped.send_signal(signal.SIGCONT)
        asking.wait_answers()
        question.join(WAIT_S)
    assert sick_target.faults(folder_of(server), "STOP")[-1] >= CHUNK, "nothing of the prompt was computed yet"
    assert answers == [expected]
    assert not asking.failures, asking.failures[:2]
    assert asking.expected["tool call"][1][1], "a call was forced"
    check_nothing_leaked(server, before)


@pytest.mark.parametrize("victims", [*COMBINATIONS[3:], ALL], ids="-".join)
def test_deaths_under_streams_change_no_token(server: Apart, victims: tuple[str, ...]) -> None:
    with Load(server, 8) as load:
        load.wait_progress()
        drafts = server.metric("vllm:spec_decode_num_draft_tokens_total")
        assert drafts > 0, "the drafter has nothing to lose"
        before = Footprint.of(server)
        for _ in range(2):
            for victim in victims:
                send(server, victim, signal.SIGKILL)
            load.wait_progress(40)
    load.check(8)
    check_nothing_leaked(server)
    assert Footprint.of(server).zombies == () and Footprint.of(server).run_files == before.run_files


def test_a_drafter_that_is_stuck_in_a_draft_is_replaced_and_no_stream_waits_for_it(server: Apart) -> None:
    def num_hung() -> int:
        return len(sick_target.faults(folder_of(server), sick_drafter.DRAFT))

    server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", READY_S)
    with Load(server, 4) as load:
        load.wait_progress()
        before, num_before = server.worker(DRAFTER), num_hung()
        sick_target.arm(folder_of(server), sick_drafter.DRAFT)
        server.wait_for(lambda: num_hung() > num_before, "the draft hangs")
        load.wait_progress(40)
        assert before.is_running(), "streams did not go on beside it"
        psutil.wait_procs([before], timeout=WAIT_S)
        server.wait_for(lambda: server.metric("tandem:worker_up", role="drafter") == 1, "drafter back", READY_S)
        drafts = server.metric("tandem:draft_seconds_count")
        server.wait_for(lambda: server.metric("tandem:draft_seconds_count") > drafts, "it drafts again")
    assert not before.is_running()
    load.check(4)
    check_nothing_leaked(server)


def test_a_stream_that_goes_on_after_a_kill_takes_its_prompt_from_ssd(server: Apart) -> None:
    word = sick_target.WATCHED
    prompts = [f"{i}. " + f"{word} is in every chunk. " * 7 for i in range(MAX_TRIES)]
    num_blocks = len(prompts[0]) // 32

    def computed() -> list[int]:
        """Where the rows began in which tokens of this prompt were computed."""
        return sick_target.faults(folder_of(server), word)

    def num_on_ssd() -> float:
        return server.metric("tandem:prefix_blocks", tier="ssd")

    for prompt in prompts:
        num_before, wanted = len(computed()), num_on_ssd() + num_blocks
        stream = Stream(server, prompt=prompt, logprobs=1)
        server.wait_for(lambda wanted=wanted: num_on_ssd() >= wanted, "written to SSD")
        assert computed()[num_before : num_before + 2] == [0, CHUNK], "the cache had it already"
        num_before = len(computed())
        send(server, TARGET, signal.SIGKILL)
        is_hit = stream.is_alive()
        stream.result()
        if is_hit:
            break
    else:
        raise AssertionError("the stream had always ended before")
    assert all(start >= 32 * (num_blocks - 1) for start in computed()[num_before:]), computed()[num_before:]
    clear_cache(server)
    undisturbed = Stream(server, prompt=prompt, logprobs=1)
    undisturbed.result()
    assert stream.tokens == undisturbed.tokens
    check_nothing_leaked(server)
