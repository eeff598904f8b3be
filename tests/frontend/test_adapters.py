"""An adapter's name is a model's name on every route, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from frontend.model_side import ModelSide
from shared.config import Settings
from shared.errors import BadConfig
from shared.messages import Submit
from tests.frontend.conftest import RunningServer, byte_text, ids
from tests.support.fake_engine import FakeEngine, says

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    "/v1/responses": {"input": "x", "max_output_tokens": 4},
}


@pytest.fixture
def server(engine: FakeEngine, start_server: Callable[..., RunningServer], settings: Settings) -> RunningServer:
    engine.on_submit = says(ids("abcd"))
    running = start_server(settings=msgspec.structs.replace(settings, adapters="sql=./sql-lora,org/tone"))
    running.wait_status("/health", 200)
    return running


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("model", "adapter", "shown"), [("default", "", "Fake-1B"), ("sql", "sql", "sql"), ("tone", "tone", "tone")]
)
def test_a_request_names_its_adapter_as_its_model(
    route: str, model: str, adapter: str, shown: str, server: RunningServer, engine: FakeEngine
) -> None:
    answer = server.http.post(route, json={**ROUTES[route], "model": model})
    assert answer.status_code == 200, answer.text
    assert engine.wait_for(Submit)[0].adapter == adapter
    assert answer.json()["model"] == shown


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_name_is_told_the_known_ones(route: str, server: RunningServer) -> None:
    answer = server.http.post(route, json={**ROUTES[route], "model": "sqll"})
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert all(name in message for name in ("'sqll'", "'Fake-1B'", "'sql'", "'tone'"))


def test_streams_tell_the_adapter_in_every_chunk(server: RunningServer) -> None:
    with server.openai() as client:
        chunks = list(client.completions.create(model="sql", prompt="x", max_tokens=4, stream=True))
    assert len(chunks) > 1 and {chunk.model for chunk in chunks} == {"sql"}


def test_models_lists_adapters_with_their_parent(server: RunningServer) -> None:
    page = server.http.get("/v1/models").json()
    told = [(card["id"], card["parent"], card["root"]) for card in page["data"]]
    assert told == [("Fake-1B", None, "default"), ("sql", "Fake-1B", "./sql-lora"), ("tone", "Fake-1B", "org/tone")]
    assert (page["first_id"], page["last_id"]) == ("Fake-1B", "tone")
    with server.openai() as client:
        assert client.models.retrieve("sql").id == "sql"
        assert [model.id for model in client.models.list()] == ["Fake-1B", "sql", "tone"]


@pytest.mark.parametrize("name", ["default", "Fake-1B"])
def test_an_adapter_cannot_have_the_models_own_name(name: str, tmp_path: Path) -> None:
    settings = Settings(cache_dir=str(tmp_path), adapters=f"{name}=./x")
    with pytest.raises(BadConfig, match="a name of the model itself"):
        ModelSide(settings, "Fake-1B", byte_text())
