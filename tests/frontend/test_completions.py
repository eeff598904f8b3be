"""Plain completions, models, tokenizing, keys, metrics."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import openai
import pytest

from shared.config import Settings
from shared.messages import Submit, TokenLogprob, TopLogprob
from tests.frontend.conftest import EOS, RunningServer, ids
from tests.support.fake_engine import FakeEngine, says


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [ids("ab")]),
        (["ab", "c"], [ids("ab"), ids("c")]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_prompts_of_every_form(
    client: openai.OpenAI, engine: FakeEngine, prompt: object, expected: list[list[int]]
) -> None:
    def answer(engine: FakeEngine, submit: Submit) -> None:
        says([*ids(f"after {len(submit.prompt_token_ids)}"), EOS])(engine, submit)

    engine.on_submit = answer
    whole = client.completions.create(model="default", prompt=prompt, n=2)  # type: ignore[call-overload]
    submits = engine.wait_for(Submit, count=2 * len(expected))
    assert [s.prompt_token_ids for s in submits] == [p for p in expected for _ in range(2)]
    assert [c.text for c in whole.choices] == [f"after {len(p)}" for p in expected for _ in range(2)]
    assert [c.index for c in whole.choices] == list(range(2 * len(expected)))
    assert whole.usage.prompt_tokens == sum(len(p) for p in expected)
    streamed = [""] * len(whole.choices)
    for chunk in client.completions.create(model="default", prompt=prompt, n=2, stream=True):  # type: ignore[call-overload]
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in whole.choices]


def test_logprobs_have_offsets_and_names(client: openai.OpenAI, engine: FakeEngine) -> None:
    told = ids("aéb")
    zed = ids("z")[0]

    def answer(engine: FakeEngine, submit: Submit) -> None:
        values = [TokenLogprob(logprob=-1.0, top=[TopLogprob(token_id=zed, logprob=float("-inf"))]) for _ in told]
        engine.send_output(submit.request_id, told, logprobs=values, finish_reason="length")

    engine.on_submit = answer
    block = client.completions.create(model="default", prompt="x", logprobs=1).choices[0].logprobs
    assert block is not None
    assert block.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert block.text_offset == [0, 1, 1, 2]
    assert block.top_logprobs == [{"z": -9999.0}] * 4


def test_models_tell_the_context_window(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [m.id for m in models] == ["Fake-1B"]
    extra = models[0].model_extra
    assert extra is not None
    assert (extra["max_model_len"], extra["context_window"], extra["root"]) == (2048, 2048, "default")
    assert client.models.retrieve("Fake-1B").owned_by == "tandem"


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    plain = server.http.post("/tokenize", json={"prompt": "hé"}).json()
    assert (plain["tokens"], plain["count"], plain["max_model_len"]) == (ids("hé"), 3, 2048)
    chat = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["tokens"][0] == 1
    text = server.http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert server.http.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    assert server.http.post("/detokenize", json={"tokens": [-1]}).json()["error"]["param"] == "tokens"


def test_api_keys_guard_all_but_health(
    settings: Settings, engine: FakeEngine, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(settings=msgspec.structs.replace(settings, api_keys="alpha, beta"))
    server.wait_status("/health", 200)
    engine.on_submit = says([EOS])
    for headers in ({}, {"authorization": "Bearer alph"}, {"authorization": "Basic alpha"}):
        refused = server.http.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    tenants = set()
    for key in ("alpha", "beta"):
        with server.openai(api_key=key) as client:
            client.completions.create(model="default", prompt="x")
    tenants = {submit.tenant for submit in engine.wait_for(Submit, count=2)}
    assert len(tenants) == 2
    assert not {"alpha", "beta", ""} & tenants


def test_metrics_join_the_engines_page_and_our_own(server: RunningServer, engine: FakeEngine) -> None:
    server.http.get("/v1/models")
    server.http.get("/stranger/1")
    page = server.http.get("/metrics").text
    assert "vllm:x 1.0" in page
    assert 'http_requests_total{method="GET",path="/v1/models",status="200"} 1.0' in page
    assert 'path="other",status="404"' in page
    assert "stranger" not in page
    assert 'http_request_duration_seconds_count{method="GET",path="/v1/models"} 1.0' in page
    engine.metrics_page = None  # a scheduler that does not answer
    own = server.http.get("/metrics").text
    assert "vllm:x" not in own
    assert "http_requests_total" in own


def test_request_ids_are_echoed_when_safe(server: RunningServer) -> None:
    assert server.http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")


def test_openapi_defines_every_schema_it_refers_to(server: RunningServer) -> None:
    page = server.http.get("/openapi.json").text
    schemas = msgspec.json.decode(page)["components"]["schemas"]
    for reference in {part.split('"')[0] for part in page.split("#/components/schemas/")[1:]}:
        assert reference in schemas
    assert "max_completion_tokens" in schemas["ChatBody"]["properties"]
