"""Outputs that come twice, out of order or not at all: the client's text is whole, each token once."""

from __future__ import annotations

import openai
import pytest

from shared.messages import Output, Outputs, Submit
from tests.frontend.conftest import ids
from tests.support.fake_engine import FakeEngine, timings

TEXT = "abcdefgh"


def out(submit: Submit, start: int, text: str, *, ends: bool = False) -> Outputs:
    last = timings(num_prompt_tokens=1, num_output_tokens=start + len(text)) if ends else None
    reason = "length" if ends else None
    output = Output(
        request_id=submit.request_id, token_ids=ids(text), start=start, finish_reason=reason, timings=last
    )  # fmt: skip
    return Outputs(outputs=[output])


ORDERS = {
    "repeated": [(0, "ab"), (0, "ab"), (2, "cd"), (0, "ab"), (2, "cd"), (4, "efgh")],
    "overlapping": [(0, "abc"), (1, "bcde"), (0, "abcdef"), (4, "efgh")],
    "swapped": [(0, "ab"), (4, "ef"), (2, "cd"), (4, "efgh")],
    "lost": [(0, "ab"), (4, "efgh")],
    "end repeated": [(0, "abcdefgh"), (0, "abcdefgh")],
}


@pytest.mark.parametrize("order", ORDERS)
def test_each_token_is_shown_once_and_in_its_place(order: str, client: openai.OpenAI, engine: FakeEngine) -> None:
    submits: list[Submit] = []

    def answer(engine: FakeEngine, submit: Submit) -> None:
        submits.append(submit)
        if submit.output_token_ids:  # what a scheduler does with a request that it has
            start = len(submit.output_token_ids)
            engine.send(out(submit, start, TEXT[start:], ends=True))
            return
        for start, text in ORDERS[order]:
            engine.send(out(submit, start, text, ends=start + len(text) == len(TEXT)))

    engine.on_submit = answer
    completion = client.completions.create(model="default", prompt="x", max_tokens=len(TEXT))
    assert completion.choices[0].text == TEXT
    assert completion.choices[0].finish_reason == "length"
    assert len(submits) == (2 if order == "lost" else 1)
