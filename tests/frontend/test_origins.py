"""`return_token_origins`: which tokens were drafted and by what, in whole and streamed answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest

from shared.messages import FinishReason, Submit, TokenLogprob, Verified
from tests.frontend.agent_server import AgentServer, running
from tests.frontend.conftest import EOS, RunningServer, ids
from tests.support.fake_engine import FakeEngine

Json = dict[str, Any]
ASK: Json = {"model": "default", "messages": [{"role": "user", "content": "Go"}], "return_token_origins": True}
TOOLS = [{"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}]


def by(drafter: str, num_accepted: int, num_draft_tokens: int = 4) -> Verified:
    return Verified(drafter=drafter, num_draft_tokens=num_draft_tokens, num_accepted=num_accepted)


Lot = tuple[list[int], Verified | None]


def plays(lots: list[Lot], finish_reason: FinishReason = "stop") -> Any:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        for tokens, verified in lots[:-1]:
            engine.send_output(submit.request_id, tokens, verified=verified)
        tokens, verified = lots[-1]
        engine.send_output(submit.request_id, tokens, verified=verified, finish_reason=finish_reason)

    return answer


def streamed(server: RunningServer, body: Json, path: str = "/v1/chat/completions") -> list[Json]:
    chunks = []
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=20) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks.append(msgspec.json.decode(line[6:]))
    return chunks


def told(chunks: list[Json]) -> list[tuple[str, str]]:
    return [
        (origin["text"], origin["origin"])
        for chunk in chunks
        for choice in chunk["choices"]
        for origin in choice.get("tandem", {}).get("origins", [])
    ]


LOTS: list[Lot] = [
    (ids("a"), None),
    (ids("bcd"), by("ngram", 2)),
    (ids("é"), by("eagle3", 1)),  # two tokens, one character
    (ids("x"), by("suffix", 0)),
    ([*ids("y"), EOS], by("model", 1)),
]
ORIGINS = [
    ("a", "target"), ("b", "ngram"), ("c", "ngram"), ("d", "target"), ("", "eagle3"), ("é", "target"), ("x", "target"),
    ("y", "model"), ("", "target"),
]  # fmt: skip


def test_each_token_has_its_text_and_origin(server: RunningServer, engine: FakeEngine) -> None:
    engine.on_submit = plays(LOTS)
    whole = server.http.post("/v1/chat/completions", json=ASK).json()
    (choice,) = whole["choices"]
    assert [(o["text"], o["origin"]) for o in choice["tandem"]["origins"]] == ORIGINS
    assert choice["message"]["content"] == "abcdéxy"
    assert (choice["tandem"]["draft_n"], choice["tandem"]["draft_n_accepted"]) == (16, 4)
    assert len(choice["tandem"]["origins"]) == whole["usage"]["completion_tokens"]
    chunks = streamed(server, ASK)
    assert told(chunks) == ORIGINS
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["delta"].get("content"):  # the text beside the origins is what these tokens wrote
                assert "".join(o["text"] for o in part["tandem"]["origins"]) == part["delta"]["content"]
    accepted = [c["tandem"]["draft_n_accepted"] for chunk in chunks for c in chunk["choices"] if "tandem" in c]
    assert accepted == sorted(accepted) and accepted[-1] == 4


def test_plain_completions_tell_it_too(server: RunningServer, engine: FakeEngine) -> None:
    engine.on_submit = plays(LOTS)
    body = {"model": "default", "prompt": "Go", "return_token_origins": True}
    assert told(streamed(server, body, "/v1/completions")) == ORIGINS


def test_nothing_is_told_unasked(server: RunningServer, engine: FakeEngine) -> None:
    engine.on_submit = plays(LOTS)
    body = {name: value for name, value in ASK.items() if name != "return_token_origins"}
    assert "tandem" not in server.http.post("/v1/chat/completions", json=body).text
    assert not any("tandem" in choice for chunk in streamed(server, body) for choice in chunk["choices"])


def test_tokens_after_a_stop_string_are_not_told(server: RunningServer, engine: FakeEngine) -> None:
    engine.on_submit = plays([(ids("a"), None), (ids("bSTOPc"), by("ngram", 5, 7))], "length")
    whole = server.http.post("/v1/chat/completions", json=ASK | {"stop": "STOP"}).json()
    assert "".join(o["text"] for o in whole["choices"][0]["tandem"]["origins"]) == "abSTOP"
    assert len(whole["choices"][0]["tandem"]["origins"]) == whole["usage"]["completion_tokens"] == 6
    assert whole["choices"][0]["message"]["content"] == "ab"


def test_tokens_that_were_lost_and_sent_again_are_of_unknown_origin(server: RunningServer, engine: FakeEngine) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        engine.send_output(submit.request_id, ids("ab"), is_repeated=True)
        engine.send_output(submit.request_id, ids("cd"), verified=by("ngram", 1), finish_reason="length")

    engine.on_submit = answer
    assert told(streamed(server, ASK)) == [("a", "unknown"), ("b", "unknown"), ("c", "ngram"), ("d", "target")]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with running(tmp_path_factory.mktemp("run"), tool_parser="hermes", reasoning_parser="think") as agent:
        yield agent


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_no_token_of_reasoning_or_calls_is_left_out(agent: AgentServer, chunk: int) -> None:
    output = '<think>I see</think>Hi<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    agent.reset(output, chunk=chunk)
    told_of = told(streamed(agent.server, ASK | {"tools": TOOLS}))
    assert "".join(text for text, _ in told_of) == output
    assert len(told_of) == len(ids(output)) + 1


def test_no_logprob_of_a_token_that_ends_a_call_is_lost(agent: AgentServer) -> None:
    tokens = [*ids('<tool_call>{"name": "stop", "arguments": {}}</tool_call>'), EOS]

    def answer(engine: FakeEngine, submit: Submit) -> None:
        for n, token in enumerate(tokens):
            value = [TokenLogprob(logprob=-float(n), top=[])]
            engine.send_output(
                submit.request_id, [token], logprobs=value, finish_reason="stop" if token == EOS else None
            )

    agent.reset()
    agent.engine.on_submit = answer
    entries = []
    with agent.server.openai() as client:
        stream = client.chat.completions.create(
            model="default", messages=ASK["messages"], tools=TOOLS, logprobs=True, stream=True
        )  # type: ignore[call-overload]
        for chunk in stream:
            entries += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [entry.logprob for entry in entries] == [-float(n) for n in range(len(tokens))]


def test_the_field_is_a_boolean(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="default", messages=ASK["messages"], extra_body={"return_token_origins": "yes"}
        )
    assert caught.value.param == "return_token_origins"
