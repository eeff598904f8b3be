"""Chat completions through the openai SDK."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import openai
import pytest

from shared.messages import Cancel, Submit, TokenLogprob, TopLogprob
from tests.frontend.conftest import EOS, RunningServer, byte_text, ids
from tests.support.fake_engine import FakeEngine, says

HELLO = [{"role": "user", "content": "Hi"}]


def test_answer_has_text_usage_and_timings(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = says([*ids("Hello wörld"), EOS])
    answer = client.chat.completions.create(model="default", messages=HELLO)
    submit = engine.wait_for(Submit)[0]
    assert submit.prompt_token_ids[0] == 1
    assert submit.max_tokens == 2048 - len(submit.prompt_token_ids)
    assert answer.choices[0].message.content == "Hello wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(submit.prompt_token_ids)
    assert answer.usage.completion_tokens == len(ids("Hello wörld")) + 1
    assert answer.system_fingerprint == "fp_fake"
    assert answer.model_extra is not None
    assert answer.model_extra["timings"]["draft_n_accepted"] == 3


def test_stream_begins_with_the_role_and_ends_with_usage(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = says([*ids("Hello wörld"), EOS])
    chunks = list(
        client.chat.completions.create(
            model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello wörld"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids("Hello wörld")) + 1


def test_a_delta_goes_out_when_it_comes(server: RunningServer, engine: FakeEngine) -> None:
    """The next token is made only once this one was seen: a server that collects deltas for 10 ms would show it."""
    body = {"model": "default", "messages": HELLO, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        request_id = engine.wait_for(Submit)[0].request_id
        lines = (line for line in answer.iter_lines() if '"content":"x"' in line)
        seconds = []
        for _ in range(150):
            started = time.perf_counter()
            engine.send_output(request_id, ids("x"))
            next(lines)
            seconds.append(time.perf_counter() - started)
        engine.send_output(request_id, [EOS], finish_reason="stop")
    assert statistics.median(seconds) < 0.008


def test_the_next_turn_tokenizes_only_what_is_new(
    server: RunningServer, client: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frontend.service.INLINE_CHARS", 64)
    engine.on_submit = says([*ids("ok"), EOS])
    turns = [{"role": "user", "content": "first " * 60}]
    client.chat.completions.create(model="default", messages=turns)  # type: ignore[arg-type]  # the SDK's own dicts
    segments = server.service.segments
    assert segments.num_remembered_chars == 0
    turns += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "second " * 60}]
    for tenant, remembered in (("", 360), ("other", 360), ("", 360 + 780)):
        headers = {"X-Cache-Tenant": tenant} if tenant else {}
        client.chat.completions.create(model="default", messages=turns, extra_headers=headers)  # type: ignore[arg-type]
        assert remembered <= segments.num_remembered_chars < remembered + 60
    tokens = server.http.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert [submit.prompt_token_ids for submit in engine.wait_for(Submit, count=4)[1:]] == [tokens] * 3


def lp(token_id: int, logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(logprob=logprob, top=[TopLogprob(token_id=i, logprob=value) for i, value in top])


# ---------------------------------------------------------------- several outputs, seeds, defaults


def test_n_outputs_have_seeds_of_their_own(client: openai.OpenAI, engine: FakeEngine) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        says([*ids("output " + submit.request_id[-1]), EOS])(engine, submit)

    engine.on_submit = answer
    whole = client.chat.completions.create(model="default", messages=HELLO, n=2, seed=7)
    assert [c.message.content for c in whole.choices] == ["output 0", "output 1"]
    submits = engine.wait_for(Submit, count=2)
    assert submits[0].sampling.seed == 7
    assert submits[1].sampling.seed != 7
    assert all(s.sampling.is_seeded for s in submits)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(submits[0].prompt_token_ids)
    texts = ["", ""]
    reasons = []
    for chunk in client.chat.completions.create(model="default", messages=HELLO, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == ["output 0", "output 1"]
    assert reasons == ["stop", "stop"]


def test_without_a_seed_one_is_drawn(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = says([EOS])
    for _ in range(2):
        client.chat.completions.create(model="default", messages=HELLO)
    first, second = (s.sampling for s in engine.wait_for(Submit, count=2))
    assert first.seed != second.seed
    assert not first.is_seeded
    assert (first.temperature, first.top_p, first.top_k) == (1.0, 1.0, 0)


def test_generation_config_gives_defaults_and_fields_override_them(
    engine: FakeEngine, start_server: Callable[..., RunningServer]
) -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "max_length": 20}
    server = start_server(byte_text(sampling_defaults=defaults))
    server.wait_status("/health", 200)
    engine.on_submit = says([EOS])
    with server.openai() as client:
        client.chat.completions.create(
            model="default", messages=HELLO, temperature=0, extra_body={"top_k": -1, "min_p": 0.1}
        )
    sampling = engine.wait_for(Submit)[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.0, 0, 0.1)
    assert (sampling.top_p, sampling.repetition_penalty) == (0.9, 1.1)


def test_fields_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = says([EOS])
    client.chat.completions.create(
        model="default",
        messages=HELLO,
        max_completion_tokens=9,
        logit_bias={"5": -3},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        extra_body={"stop_token_ids": [77], "min_tokens": 2, "ignore_eos": True, "priority": 4},
    )
    submit = engine.wait_for(Submit)[0]
    assert (submit.max_tokens, submit.min_tokens, submit.priority, submit.stop_token_ids) == (9, 2, 4, [77])
    assert submit.sampling.logit_bias == {5: -3.0}
    assert (submit.sampling.presence_penalty, submit.sampling.frequency_penalty) == (0.5, -0.5)


# ---------------------------------------------------------------- ends


def test_length_is_told_and_a_cut_character_is_closed(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = says(ids("ab👍"))
    answer = client.chat.completions.create(model="default", messages=HELLO, max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "ab\ufffd"


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_token_borders_ends_early(
    client: openai.OpenAI, engine: FakeEngine, chunk: int, stream: bool
) -> None:
    """The engine goes on until it is cancelled; nothing after the stop string is shown or counted."""
    told = ids("one two STOP three")

    def answer(engine: FakeEngine, submit: Submit) -> None:
        for i in range(0, len(told), chunk):
            engine.send_output(submit.request_id, told[i : i + chunk])

    engine.on_submit = answer
    request = {"model": "default", "messages": HELLO, "stop": ["STOP", "never"]}
    if stream:
        chunks = list(
            client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        usage = chunks[-1].usage
    else:
        whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
        text, usage = whole.choices[0].message.content, whole.usage
        assert whole.choices[0].finish_reason == "stop"
        assert whole.model_extra["timings"]["predicted_n"] == len("one two STOP")
    assert text == "one two "
    assert usage.completion_tokens == len("one two STOP")
    assert engine.wait_for(Cancel)[0].reason == "stop_string"


def test_a_stop_that_the_engine_never_confirms_still_ends(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.confirms_cancels = False
    engine.on_submit = lambda engine, submit: engine.send_output(submit.request_id, ids("a#b"))
    answer = client.chat.completions.create(model="default", messages=HELLO, stop="#")
    assert answer.choices[0].message.content == "a"
    assert answer.choices[0].finish_reason == "stop"


def test_what_a_stop_held_back_is_shown_when_it_does_not_come(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = says([*ids("abcST"), EOS])
    answer = client.chat.completions.create(model="default", messages=HELLO, stop="STOP")
    assert answer.choices[0].message.content == "abcST"


def test_a_stop_token_is_counted_but_not_shown(client: openai.OpenAI, engine: FakeEngine) -> None:
    bang = ids("!")[0]
    engine.on_submit = says([*ids("hey"), bang])
    answer = client.chat.completions.create(model="default", messages=HELLO, extra_body={"stop_token_ids": [bang]})
    assert answer.choices[0].message.content == "hey"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_of_whole_and_streamed_answers(client: openai.OpenAI, engine: FakeEngine) -> None:
    told = ids("aé")
    values = [lp(i, -0.5 * (n + 1), (i, -0.5 * (n + 1)), (ids("z")[0], -3.0)) for n, i in enumerate([*told, EOS])]

    def answer(engine: FakeEngine, submit: Submit) -> None:
        for n, token_id in enumerate(told):
            engine.send_output(submit.request_id, [token_id], logprobs=[values[n]])
        engine.send_output(submit.request_id, [EOS], logprobs=[values[-1]], finish_reason="stop")

    engine.on_submit = answer
    request = {"model": "default", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    entries = whole.choices[0].logprobs.content
    assert engine.wait_for(Submit)[0].sampling.num_logprobs == 2
    assert [bytes(entry.bytes) for entry in entries] == [b"a", b"\xc3", b"\xa9", b"<|im_end|>"]
    assert [entry.logprob for entry in entries] == [-0.5, -1.0, -1.5, -2.0]
    assert entries[0].token == "a"
    assert [top.token for top in entries[0].top_logprobs] == ["a", "z"]
    streamed = []
    text = ""
    for chunk in client.chat.completions.create(**request, stream=True):  # type: ignore[call-overload]
        text += chunk.choices[0].delta.content or ""
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert text == "aé"
    assert streamed == entries


def test_cached_tokens_are_told(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.on_submit = lambda engine, submit: engine.send_output(
        submit.request_id, [EOS], finish_reason="stop", num_cached_tokens=8
    )
    answer = client.chat.completions.create(model="default", messages=HELLO)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 8
    assert answer.model_extra is not None
    timings = answer.model_extra["timings"]
    assert (timings["cache_n"], timings["prompt_n"]) == (8, answer.usage.prompt_tokens - 8)
    assert timings["prompt_per_second"] == pytest.approx(timings["prompt_n"] / 0.01)
