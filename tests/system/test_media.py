"""Images through HTTP, the OpenAI SDK and the real processes, with a tiny Qwen2-VL and a tiny Qwen3.5 that drafts."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.frontend.test_media import BAD
from tests.support import tiny_model, tiny_qwen35
from tests.support.clips import moving, written
from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

SIZE = (40, 24)  # pixels: 5 x 3 merged patches
IMAGE_TOKENS = 15


@pytest.fixture(scope="module")
def vision_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tiny_model.write_qwen2_vl(tmp_path_factory.mktemp("vision") / "tiny")
    with Server(folder, tmp_path_factory.mktemp("server"), max_num_seqs=8) as running:
        yield running


MAX_TRIES = 8  # on a busy machine a stream may be over before it is looked at


def part(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"type": "image_url", "image_url": {"url": uri(stream.getvalue())}}


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def client_of(server: Server) -> openai.OpenAI:
    return server.openai()


def ask(client: openai.OpenAI, *content: dict[str, Any], max_tokens: int = 24) -> tuple[str, int, int]:
    """(text, prompt tokens, cached tokens) of a greedy answer."""
    messages: list[Any] = [{"role": "user", "content": list(content)}]
    # The model is random: it would write a placeholder or end its turn now and then.
    answer = client.chat.completions.create(
        model="default", messages=messages, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return (
        answer.choices[0].message.content or "",
        answer.usage.prompt_tokens,
        answer.usage.prompt_tokens_details.cached_tokens or 0,
    )


def test_images_are_seen_counted_cached_and_streamed(vision_server: Server) -> None:
    with client_of(vision_server) as client:
        text, num_tokens, cached = ask(client, words("What is it? "), part(1))
        assert cached == 0
        _, without, _ = ask(client, words("What is it? "))
        assert num_tokens == without + IMAGE_TOKENS + 2  # vision start and end
        again, _, cached = ask(client, words("What is it? "), part(1))
        assert (again, cached > IMAGE_TOKENS) == (text, True)
        other, _, cached_other = ask(client, words("What is it? "), part(2))
        assert other != text, "the pixels change the answer"
        assert cached_other < cached, "the same text with other pixels is another prefix"
        messages: list[Any] = [{"role": "user", "content": [words("What is it? "), part(1)]}]
        stream = client.chat.completions.create(
            model="default", messages=messages, max_tokens=24, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text


def test_responses_see_the_same_image_and_one_in_a_tools_result(vision_server: Server) -> None:
    url = part(1)["image_url"]["url"]
    image: Any = {"type": "input_image", "image_url": url, "detail": "auto"}
    with client_of(vision_server) as client:
        messages: list[Any] = [{"role": "user", "content": [words("What is it? "), part(1)]}]
        chat = client.chat.completions.create(model="default", messages=messages, max_tokens=24, temperature=0)
        content: Any = [{"type": "input_text", "text": "What is it? "}, image]
        response = client.responses.create(
            model="default", input=[{"role": "user", "content": content}], max_output_tokens=24, temperature=0
        )
        assert chat.usage is not None and response.usage is not None
        assert response.output_text == chat.choices[0].message.content
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        call: Any = {"type": "function_call", "call_id": "c", "name": "shoot", "arguments": "{}"}
        output: Any = {"type": "function_call_output", "call_id": "c", "output": [image]}
        second = client.responses.create(
            model="default", input=[call, output], previous_response_id=response.id, max_output_tokens=24, temperature=0
        )
        assert second.usage is not None
        assert second.usage.input_tokens > response.usage.input_tokens + IMAGE_TOKENS
        assert second.usage.input_tokens_details.cached_tokens > IMAGE_TOKENS, "the first image is found in the cache"


def test_messages_see_an_image_in_a_tools_result(vision_server: Server) -> None:
    def result(seed: int | None) -> Any:
        if seed is None:
            return [{"type": "text", "text": "none"}]
        data = part(seed)["image_url"]["url"].split(",")[1]
        return [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}]

    def ask(seed: int | None) -> tuple[str, int]:
        """(text, prompt tokens) of a greedy answer."""
        turns: Any = [
            {"role": "user", "content": "Look"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "shoot", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": result(seed)}]},
        ]
        with anthropic.Anthropic(base_url=vision_server.url, api_key="none", max_retries=0, timeout=60) as sdk:
            counted = sdk.messages.count_tokens(model="default", messages=turns)
            answer = sdk.messages.create(model="default", max_tokens=24, messages=turns, extra_body={"temperature": 0})
        used = answer.usage
        assert used.input_tokens + (used.cache_read_input_tokens or 0) == counted.input_tokens
        return "".join(block.text for block in answer.content if block.type == "text"), counted.input_tokens

    first, num_tokens = ask(1)
    assert num_tokens > ask(None)[1] + IMAGE_TOKENS
    assert ask(1) == (first, num_tokens)
    assert any(ask(seed)[0] != first for seed in (2, 3, 4)), "the pixels change the answer"


def test_the_order_of_two_images_matters(vision_server: Server) -> None:
    with client_of(vision_server) as client:
        texts = [ask(client, part(a), part(b), words("which?"))[0] for a, b in ((1, 2), (2, 1), (1, 2))]
    assert texts[0] == texts[2] != texts[1]


def test_requests_with_and_without_images_together_give_what_each_gives_alone(vision_server: Server) -> None:
    contents = [
        [part(3), words("one")],
        [words("just words, no picture")],
        [words("a"), part(4), words("b"), part(3)],
        [words("x"), part(5)],
    ]
    with client_of(vision_server) as client, ThreadPoolExecutor(len(contents)) as threads:
        together = list(threads.map(lambda content: ask(client, *content)[0], contents))
        httpx.delete(f"{vision_server.url}/v1/cache").raise_for_status()
        assert [ask(client, *content)[0] for content in contents] == together


def test_a_target_killed_under_an_image_request_changes_nothing(vision_server: Server) -> None:
    with client_of(vision_server) as client:
        expected, *_ = ask(client, part(6), words("and then?"), max_tokens=300)
        before = vision_server.metric("tandem:worker_restarts_total", role="target")
        for _ in range(MAX_TRIES):
            text, is_killed = stream_and_kill(vision_server, client)
            assert text == expected
            if is_killed:
                break
        assert is_killed, "the streams had always ended before"
        vision_server.wait_for(
            lambda: vision_server.metric("tandem:worker_restarts_total", role="target") == before + 1, "its restart"
        )


def stream_and_kill(server: Server, client: openai.OpenAI) -> tuple[str, bool]:
    """An answer about an image that is not cached, and whether the target was killed while it was written."""
    httpx.delete(f"{server.url}/v1/cache").raise_for_status()
    messages: list[Any] = [{"role": "user", "content": [part(6), words("and then?")]}]
    stream = client.chat.completions.create(
        model="default", messages=messages, max_tokens=300, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    text, is_killed = "", False
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        if text and not is_killed and server.metric("vllm:num_requests_running"):
            server.worker("workers.target").kill()
            is_killed = True
    return text, is_killed


@pytest.fixture(scope="module")
def hybrid_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Qwen3.5 whose own MTP head drafts."""
    folder = tiny_qwen35.write(tmp_path_factory.mktemp("hybrid") / "tiny")
    # Where the drafter shares the target's cores, the policy would draft nothing.
    with Server(
        folder, tmp_path_factory.mktemp("hybrid_server"), max_num_seqs=4, draft_model=folder, draft_tokens=2
    ) as running:
        running.wait_for(lambda: running.metric("tandem:worker_up", role="drafter") == 1, "drafter ready", 120.0)
        yield running


def test_qwen35_sees_images_and_drafts_behind_them(hybrid_server: Server) -> None:
    with client_of(hybrid_server) as client:
        content = [words("What is it? "), part(1), words("and this?"), part(2)]
        text, num_tokens, _ = ask(client, *content)
        _, without, _ = ask(client, words("What is it? and this?"))
        assert num_tokens == without + 2 * (IMAGE_TOKENS + 2)
        again, _, cached = ask(client, *content)
        assert again == text
        assert cached > 2 * IMAGE_TOKENS, "recurrent states are found again too"
        others = {ask(client, words("What is it? "), part(1), words("and this?"), part(i))[0] for i in range(3, 7)}
        assert others != {text}, "the pixels change the answer"
        assert hybrid_server.metric("vllm:spec_decode_num_draft_tokens_total") > 0
        messages: list[Any] = [{"role": "user", "content": content}]
        stream = client.chat.completions.create(
            model="default", messages=messages, max_tokens=24, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text
    assert httpx.get(f"{hybrid_server.url}/health").json()["input_modalities"] == ["text", "image", "video"]


def test_bad_images_are_400s_and_the_servers_go_on(vision_server: Server, hybrid_server: Server) -> None:
    good = part(1)
    for running in (vision_server, hybrid_server):
        with client_of(running) as client:
            for data, why in BAD.values():
                with pytest.raises(openai.BadRequestError, match=why):
                    ask(client, {"type": "image_url", "image_url": {"url": uri(data)}})
            with pytest.raises(openai.BadRequestError, match="images"):
                ask(client, *[good] * 200)
            with pytest.raises(openai.BadRequestError, match=str(tiny_model.MAX_POSITIONS)):
                ask(client, *[good] * 40)  # more tokens than the context holds
            assert ask(client, good)[1] > IMAGE_TOKENS


def clip(seed: int) -> dict[str, Any]:
    """Three seconds: two frames a second are looked at."""
    data = base64.b64encode(written(moving(30, seed=seed), fps=10)).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}


@pytest.mark.parametrize("family", ["vision_server", "hybrid_server"])
def test_videos_are_seen_beside_images_and_text(family: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(family)
    with server.openai() as client:
        alone, num_tokens, _ = ask(client, words("Watch "), clip(1), part(1))
        again, _, cached = ask(client, words("Watch "), clip(1), part(1))
        assert again == alone and cached > num_tokens // 2
        other, _, cached_other = ask(client, words("Watch "), clip(2), part(1))
        assert other != alone and cached_other < cached, "other frames are another prefix and another answer"
        contents = [
            [words("Watch "), clip(1), part(1)],
            [words("Hello there")],
            [part(2), clip(2)],
            [words("Watch "), part(1)],
        ]
        singly = [ask(client, *content)[0] for content in contents]
        with ThreadPoolExecutor(len(contents)) as pool:
            together = list(pool.map(lambda content: ask(client, *content)[0], contents))
    assert together == singly and singly[0] == alone


def test_a_bad_video_is_a_400_and_the_server_goes_on(vision_server: Server) -> None:
    with vision_server.openai() as client:
        with pytest.raises(openai.BadRequestError, match="cannot be read as any of mp4"):
            ask(client, {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})
        ask(client, words("Still there?"))


def test_modalities_are_told_and_a_text_model_refuses_images(vision_server: Server, server: Server) -> None:
    for running, modalities in ((vision_server, ["text", "image", "video"]), (server, ["text"])):
        assert httpx.get(f"{running.url}/health").json()["input_modalities"] == modalities
        assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["input_modalities"] == modalities
    with client_of(server) as client, pytest.raises(openai.BadRequestError, match="takes text only"):
        ask(client, part(1))
