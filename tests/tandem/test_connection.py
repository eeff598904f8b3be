"""A running server as the commands reach it: addresses, keys, and what is said when it is another program."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from shared.config import Settings
from shared.errors import Unavailable
from tandem.connection import connect, health, refusal
from tandem.conversation import summary


@pytest.mark.parametrize(
    ("settings", "url", "base"),
    [
        (Settings(port=9), None, "http://127.0.0.1:9"),
        (Settings(host="0.0.0.0", port=9), None, "http://127.0.0.1:9"),
        (Settings(host="::", port=9), None, "http://[::1]:9"),
        (Settings(), "https://server.lan/v1/", "https://server.lan"),
        (Settings(), "server.lan:8080", "http://server.lan:8080"),
    ],
)
def test_where_a_server_is(settings: Settings, url: str | None, base: str) -> None:
    with connect(settings, url, None) as client:
        assert str(client.base_url).rstrip("/") == base


def test_the_settings_keys_open_the_servers_own_door_and_no_other(tmp_path: Path) -> None:
    settings = Settings(api_keys="first-key,second-key")
    with connect(settings, None, None) as client:
        assert client.headers["authorization"] == "Bearer first-key"
    with connect(settings, None, "given-key") as client:
        assert client.headers["authorization"] == "Bearer given-key"
    with connect(settings, "http://elsewhere.example", None) as client:
        assert "authorization" not in client.headers


@pytest.mark.parametrize("body", ["<html>", "[]", '{"status": "ok"}'])
def test_another_program_on_the_port_is_told(body: str) -> None:
    answers = httpx.MockTransport(lambda _: httpx.Response(200, text=body))
    with (
        httpx.Client(base_url="http://x:1", transport=answers) as client,
        pytest.raises(Unavailable, match="is no Tandem server"),
    ):
        health(client)


def test_a_server_without_a_target_still_tells_its_health() -> None:
    answers = httpx.MockTransport(lambda _: httpx.Response(503, json={"scheduler": "ready", "target": "starting"}))
    with httpx.Client(base_url="http://x:1", transport=answers) as client:
        assert health(client)["target"] == "starting"


def test_a_refusal_is_one_line_and_names_the_flag_for_a_key() -> None:
    answer = httpx.Response(401, json={"error": {"message": "a valid\nAPI key is needed"}})
    assert refusal(answer) == "the server answered 401: a valid API key is needed (--api-key)"
    assert refusal(httpx.Response(502, text="bad\ngateway")) == "the server answered 502: bad gateway"


def test_the_line_under_an_answer() -> None:
    timings = {
        "predicted_n": 7, "predicted_per_second": 12.34, "draft_n": 0, "draft_n_accepted": 0, "cache_n": 0,
        "queue_ms": 100.0, "prompt_ms": 150.0,
    }  # fmt: skip
    assert summary(timings) == "7 tokens, 12.3 tokens/s, no drafts, first token in 0.25 s"
    timings |= {"draft_n": 8, "draft_n_accepted": 6, "cache_n": 64}
    assert "drafts accepted 6 of 8 (75%), 64 prompt tokens cached" in summary(timings)
