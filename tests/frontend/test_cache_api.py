"""GET and DELETE /v1/cache, and who shares cached prefixes with whom."""

from __future__ import annotations

from collections.abc import Callable

from shared.config import Settings
from shared.messages import CacheReply, CacheRequest, Submit
from tests.frontend.conftest import EOS, RunningServer, ids
from tests.support.fake_engine import FakeEngine, says

REPLY = CacheReply(
    query_id=0, enabled=True, block_size=32, blocks={"device": 3, "ssd": 9}, tier_bytes={"device": 300, "ssd": 900},
    capacity_blocks=10, query_tokens=200, hit_tokens=50, evictions=4, misses={"no_state": 2}, checks={"equal": 1},
)  # fmt: skip


def test_the_state_of_the_cache_is_told(server: RunningServer, engine: FakeEngine) -> None:
    engine.cache_reply = REPLY
    answer = server.http.get("/v1/cache").json()
    assert answer["tiers"] == {"device": {"entries": 3, "bytes": 300}, "ssd": {"entries": 9, "bytes": 900}}
    assert answer["hit_rate"] == 0.25
    assert answer["misses"] == {"no_state": 2}
    assert not engine.wait_for(CacheRequest)[-1].clear


def test_delete_empties_it(server: RunningServer, engine: FakeEngine) -> None:
    engine.cache_reply = CacheReply(query_id=0, enabled=True, cleared_blocks=7)
    assert server.http.delete("/v1/cache").json()["cleared_blocks"] == 7
    assert engine.wait_for(CacheRequest)[-1].clear


def test_a_cache_that_is_off_says_so(server: RunningServer, engine: FakeEngine) -> None:
    engine.cache_reply = CacheReply(query_id=0, enabled=False)
    assert server.http.get("/v1/cache").json() == {"object": "cache", "enabled": False}


def test_requests_carry_the_digest_of_their_key_and_the_tenant_header(
    engine: FakeEngine, settings: Settings, start_server: Callable[..., RunningServer]
) -> None:
    changed = Settings(run_dir=settings.run_dir, api_keys="one,two", heartbeat_interval_s=0.2)
    server = start_server(settings=changed)
    server.wait_status("/health", 200)
    engine.on_submit = says([*ids("x"), EOS])
    for key, headers in (("one", {}), ("two", {}), ("one", {"x-cache-tenant": "team"})):
        headers = {"authorization": f"Bearer {key}", **headers}
        body = {"model": "default", "prompt": "a", "max_tokens": 2}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
    first, second, third = engine.wait_for(Submit, count=3)
    assert first.tenant != second.tenant
    assert "one" not in first.tenant
    assert (third.tenant, third.cache_salt) == (first.tenant, "team")
