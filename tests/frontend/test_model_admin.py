"""Who may change the model, and what a door that is shut says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from frontend.drain import Door
from frontend.responses.store import Store, Stored
from shared.config import Settings
from shared.errors import Unavailable
from shared.messages import Submit
from tests.frontend.conftest import RunningServer, ids
from tests.support.fake_engine import FakeEngine, says

Start = Callable[..., RunningServer]
ADMIN = {"authorization": "Bearer boss"}
BODY = {"model": "default", "prompt": "x", "max_tokens": 4}


@pytest.mark.parametrize("route", ["load", "unload"])
def test_the_routes_are_off_without_an_admin_key_and_take_nothing_but_it(
    route: str, engine: FakeEngine, start_server: Start, settings: Settings
) -> None:
    path, body = f"/v1/models/{route}", {"model": "/no/such/folder"} if route == "load" else {}
    off = start_server()
    assert off.http.post(path, json=body, headers=ADMIN).status_code == 404
    on = start_server(settings=msgspec.structs.replace(settings, admin_key="boss", api_keys="user"))
    for headers in ({}, {"authorization": "Bearer user"}, {"x-api-key": "boss-"}):
        assert on.http.post(path, json=body, headers=headers).status_code == 403
    assert on.http.post(path, json={"modle": "x"}, headers=ADMIN).status_code == 400


def test_a_shut_door_refuses_what_costs_something_and_nothing_else(
    engine: FakeEngine, start_server: Start, settings: Settings
) -> None:
    engine.on_submit = says(ids("abcd"))
    server = start_server(settings=msgspec.structs.replace(settings, api_keys="user"))
    server.http.headers.update({"authorization": "Bearer user"})
    server.wait_status("/health", 200)
    door = server.service.door
    door.shut("loading", "a model is being loaded", 5.0)
    for path, kind in (("/v1/completions", "service_unavailable_error"), ("/v1/messages", "overloaded_error")):
        refused = server.http.post(path, json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"]["type"] == kind
    assert server.http.post("/v1/completions", json=BODY, headers={"authorization": ""}).status_code == 401
    assert server.http.get("/v1/models").status_code == 200
    assert server.http.post("/v1/responses/resp_none/cancel").status_code == 404
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    door.open()
    assert server.http.post("/v1/completions", json=BODY).status_code == 200
    assert door.num_inside == 0


def test_a_door_that_was_shut_for_good_stays_shut() -> None:
    door = Door()
    door.num_inside = 1
    asyncio.run(door.drain(0.01))  # the one inside does not end
    door.shut("loading", "a model is being loaded")
    door.open()
    with pytest.raises(Unavailable, match="shutting down"):
        door.check()


def test_draining_waits_for_background_responses(engine: FakeEngine, start_server: Start, settings: Settings) -> None:
    server = start_server(settings=msgspec.structs.replace(settings, drain_timeout_s=30.0))
    server.wait_status("/health", 200)
    begun = server.http.post("/v1/responses", json={"model": "default", "input": "x", "background": True})
    submit = engine.wait_for(Submit)[0]
    server.loop.call_soon_threadsafe(server.server.drain)
    server.wait_status("/health", 503)
    assert server.thread.is_alive()
    engine.send_output(submit.request_id, ids("done"), finish_reason="stop")
    server.thread.join(20)
    assert not server.thread.is_alive(), "the drain does not end"
    stored = asyncio.run(_stored(server.service.settings, begun.json()["id"]))
    assert stored is not None and stored.response["status"] == "completed"


async def _stored(settings: Settings, response_id: str) -> Stored | None:
    store = Store(settings)
    try:
        return await store.get("", response_id)
    finally:
        await store.close()
