"""Chat completions through the openai SDK."""

from __future__ import annotations

import openai

from shared.messages import Submit
from tests.frontend.conftest import EOS, ids
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
