"""The prefix cache through HTTP: chats, a restart of everything, a target killed while it computes a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Server

pytestmark = [pytest.mark.system, pytest.mark.mlx]

WORDS = " ".join(f"{i} bottles of beer" for i in range(24))


def ask(server: Server, prompt: str, **more: object) -> tuple[str, int]:
    """(text, cached tokens) of a greedy completion."""
    body = {"model": "default", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}
    answer: dict[str, Any] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=90).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_chat_goes_on_from_its_cached_turns_and_from_ssd_after_a_restart(model: Path, tmp_path: Path) -> None:
    with Server(model, tmp_path, prefix_cache=False) as plain:
        wanted = ask(plain, WORDS)
        assert wanted[1] == 0
        assert httpx.get(f"{plain.url}/v1/cache").json() == {"object": "cache", "enabled": False}
    with Server(model, tmp_path) as first:
        assert ask(first, WORDS) == wanted
        text, cached = ask(first, WORDS)
        assert text == wanted[0]
        assert cached > 100
        assert first.metric("vllm:prefix_cache_hits_total") == cached
        assert first.metric("tandem:prefix_hit_tokens_total", tier="device") == cached
        held = httpx.get(f"{first.url}/v1/cache").json()
        blocks = held["tiers"]["device"]["entries"]
        first.wait_for(lambda: first.metric("tandem:prefix_blocks", tier="ssd") == blocks, "written to SSD")
    with Server(model, tmp_path) as second:
        assert ask(second, WORDS) == (wanted[0], cached)
        assert second.metric("tandem:prefix_hit_tokens_total", tier="archive") == cached
        assert second.metric("tandem:prefix_hit_tokens_total", tier="device") == 0
        assert httpx.delete(f"{second.url}/v1/cache").json()["cleared_blocks"] == blocks
        assert ask(second, WORDS) == wanted
        assert ask(second, WORDS) == (wanted[0], cached)


def test_a_target_that_dies_takes_the_prompt_from_ssd_when_it_is_back(server: Server) -> None:
    expected, _ = ask(server, WORDS)
    server.wait_for(lambda: server.metric("tandem:prefix_blocks", tier="ssd") > 3, "written to SSD")
    server.worker("workers.target").kill()
    text, cached = ask(server, WORDS, max_tokens=12)
    assert text == expected
    assert cached > 100


def test_the_paged_layout_gives_the_same_text_cold_cached_drafted_and_after_a_kill(
    server: Server, model: Path, tmp_path: Path
) -> None:
    expected, _ = ask(server, WORDS, max_tokens=40)
    with Server(model, tmp_path, kv_layout="paged", draft_tokens=3) as paged:
        assert ask(paged, WORDS, max_tokens=40) == (expected, 0)
        text, cached = ask(paged, WORDS, max_tokens=40)
        assert (text, cached > 100) == (expected, True)
        assert paged.metric("vllm:spec_decode_num_draft_tokens_total") > 0
        paged.wait_for(lambda: paged.metric("tandem:prefix_blocks", tier="ssd") > 3, "written to SSD")
        paged.worker("workers.target").kill()
        restarts = "tandem:worker_restarts_total"
        paged.wait_for(lambda: paged.metric(restarts, role="target") == 1, "the death noticed")
        paged.wait_ready()
        text, cached = ask(paged, WORDS, max_tokens=40)
        assert (text, cached > 100) == (expected, True)
        assert paged.metric("tandem:prefix_hit_tokens_total", tier="archive") >= cached
