"""Images in tools' results (Messages, Responses) and in the inputs of Responses: where the prompt shows them."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from frontend.media.loader import MediaLoader
from shared.config import Settings
from shared.messages import Submit
from tests.frontend.conftest import byte_text, ids
from tests.frontend.test_media import PROCESSOR, TEMPLATE, encoded, picture, uri
from tests.support.fake_engine import FakeEngine, says

PLACE = "<|endoftext|>"  # plays the placeholder
NUM_ROWS = 15  # of an image of 40 x 24 pixels

PNG = [encoded(picture(seed=seed)) for seed in range(3)]


@pytest.fixture
def media_server(engine: FakeEngine, start_server: Any, settings: Settings) -> Any:
    running = start_server(byte_text(chat_template=TEMPLATE), media=MediaLoader(PROCESSOR, settings))
    running.wait_status("/health", 200)
    engine.on_submit = says(ids("ok"))
    return running


def seen(engine: FakeEngine) -> tuple[str, list[bytes]]:
    """The prompt with one placeholder for each image, and the images' hashes."""
    submit = [m for m in engine.received if isinstance(m, Submit)][-1]
    text = byte_text().tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    assert len(submit.media) == text.count(PLACE) / NUM_ROWS
    for item in submit.media:
        assert submit.prompt_token_ids[item.start : item.start + item.num_tokens] == [0] * NUM_ROWS
    return text.replace(PLACE * NUM_ROWS, PLACE), [item.content_hash for item in submit.media]


def anthropic_image(index: int) -> dict[str, Any]:
    data = base64.b64encode(PNG[index]).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def use(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {}}


def test_images_of_tool_results_follow_the_results_in_order(media_server: Any, engine: FakeEngine) -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "one"}, anthropic_image(0)]},
        {"type": "tool_result", "tool_use_id": "b", "content": [anthropic_image(1)]},
    ]
    turns = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": [use("a", "read"), use("b", "shoot")]},
        {"role": "user", "content": [*results, {"type": "text", "text": "And this:"}, anthropic_image(2)]},
    ]
    body = {"model": "default", "max_tokens": 5, "messages": turns}
    answer = media_server.http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    text, hashes = seen(engine)
    assert (
        "<|im_start|>tool\none\n(image: it follows the tool results)<|im_end|>\n"
        "<|im_start|>tool\n(image: it follows the tool results)<|im_end|>\n"
        f"<|im_start|>user\nImage in the result of read:\n{PLACE}Image in the result of shoot:\n{PLACE}"
        f"And this:{PLACE}<|im_end|>\n"
    ) in text
    assert len(set(hashes)) == 3
    del body["max_tokens"]
    counted = media_server.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert counted == len([m for m in engine.received if isinstance(m, Submit)][-1].prompt_token_ids)


def test_responses_take_images_in_messages_and_in_outputs_of_calls(media_server: Any, engine: FakeEngine) -> None:
    def image(index: int) -> dict[str, Any]:
        return {"type": "input_image", "image_url": uri(PNG[index]), "detail": "high"}

    def words(text: str) -> dict[str, Any]:
        return {"type": "input_text", "text": text}

    first = [{"role": "user", "content": [words("What is it?"), image(0)]}]
    made = media_server.http.post("/v1/responses", json={"input": first, "max_output_tokens": 5})
    assert made.status_code == 200, made.text
    assert f"<|im_start|>user\nWhat is it?{PLACE}<|im_end|>\n" in seen(engine)[0]
    call = {"type": "function_call", "call_id": "c", "name": "shoot", "arguments": "{}"}
    custom = {"type": "custom_tool_call", "call_id": "d", "name": "draw", "input": "x"}
    outputs = [
        {"type": "function_call_output", "call_id": "c", "output": [words("done"), image(1)]},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [image(2)]},
    ]
    body = {"input": [call, custom, *outputs], "previous_response_id": made.json()["id"], "max_output_tokens": 5}
    for more in ([], [{"role": "user", "content": "So?"}]):
        answer = media_server.http.post("/v1/responses", json=body | {"input": [*body["input"], *more]})
        assert answer.status_code == 200, answer.text
        text, hashes = seen(engine)
        assert f"What is it?{PLACE}<|im_end|>" in text, "it is stored with its conversation"
        after = "So?" if more else ""
        assert text.endswith(
            "<|im_start|>tool\ndone\n(image: it follows the tool results)<|im_end|>\n"
            "<|im_start|>tool\n(image: it follows the tool results)<|im_end|>\n"
            f"<|im_start|>user\nImage in the result of shoot:\n{PLACE}Image in the result of draw:\n{PLACE}"
            f"{after}<|im_end|>\n"
        )
        assert len(set(hashes)) == 3
    counted = media_server.http.post("/v1/responses/input_tokens", json={"input": first}).json()["input_tokens"]
    assert counted == made.json()["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("part", "role", "param", "words"),
    [
        ({"type": "input_image"}, "user", "image_url", "missing"),
        ({"type": "input_image", "file_id": "f"}, "user", "file_id", "no files"),
        ({"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "user", "image_url", "image"),
        (
            {"type": "input_image", "image_url": "https://example.org/x.png"},
            "user",
            "image_url",
            "TANDEM_ALLOW_MEDIA_URLS",
        ),
        ({"type": "input_image", "image_url": uri(PNG[0])}, "system", "", "user messages and tool results only"),
    ],
)
def test_what_cannot_be_shown_is_named(media_server: Any, part: Any, role: str, param: str, words: str) -> None:
    answer = media_server.http.post("/v1/responses", json={"input": [{"role": role, "content": [part]}]})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "input[0].content[0]" + (f".{param}" if param else "")
    assert words in error["message"]


def test_a_text_model_refuses_images_everywhere(engine: FakeEngine, start_server: Any) -> None:
    server = start_server(byte_text(chat_template=TEMPLATE))
    server.wait_status("/health", 200)
    image = {"type": "input_image", "image_url": uri(PNG[0])}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [image]}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [anthropic_image(0)]}
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [use("a", "f")]},
        {"role": "user", "content": [result]},
    ]
    for path, body in (
        ("/v1/responses", {"input": [{"role": "user", "content": [image]}]}),
        ("/v1/responses", {"input": [call, output]}),
        ("/v1/messages", {"model": "default", "max_tokens": 5, "messages": turns}),
    ):
        answer = server.http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert "takes text only" in answer.text
