"""LoRA adapters through the real processes: beside each other, behind kills and restarts, and other ones loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tandem import generate, load
from tests.faults.test_kills import IS_LONG
from tests.support import tiny_model
from tests.support.server import READY_S, Server
from tests.support.stream import BODY, Stream, held_stream, hold, wait_in_engine
from tests.support.terminal import Terminal
from tests.support.tiny_adapter import Sizes, write_mlx, write_peft

pytestmark = [pytest.mark.system, pytest.mark.mlx]

ADMIN = {"authorization": "Bearer admin-key"}
PROMPT = "the very same prompt, long enough for a cached block of its own"
NAMES = ("default", "sql", "tone")
HIDDEN, INNER = tiny_model.HIDDEN, tiny_model.INNER
QUERIES = tiny_model.HEADS * tiny_model.HEAD_DIM


def projections(layers: range) -> Sizes:
    found: dict[str, tuple[int, int]] = {}
    for i in layers:
        found[f"model.layers.{i}.self_attn.q_proj"] = (HIDDEN, QUERIES)
        found[f"model.layers.{i}.mlp.down_proj"] = (INNER, HIDDEN)
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    write_peft(folder / "sql", projections(range(tiny_model.LAYERS)), rank=4, alpha=8.0, seed=1)
    write_mlx(folder / "tone", projections(range(1, tiny_model.LAYERS)), rank=2, scale=2.0, seed=2)
    write_peft(folder / "later", projections(range(1)), rank=8, alpha=8.0, seed=3)
    return {path.name: str(path) for path in sorted(folder.iterdir())}


def setting(places: dict[str, str], *names: str) -> str:
    return ",".join(f"{name}={places[name]}" for name in names)


@pytest.fixture(scope="module")
def server(model: Path, places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    adapters = setting(places, "sql", "tone")
    with Server(model, folder, adapters=adapters, admin_key="admin-key", max_early_deaths=100) as running:
        yield running


def ask(server: Server, name: str, prompt: str = PROMPT, **more: Any) -> tuple[str, int]:
    """(text, cached tokens)"""
    body = {**BODY, "prompt": prompt, "model": name, "max_tokens": 40, **more}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=READY_S)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    return content["choices"][0]["text"], content["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def alone(server: Server) -> dict[str, str]:
    """Long texts of each, of requests that ran alone."""
    return {name: Stream(server, model=name).result() for name in NAMES}


def test_together_each_gets_what_it_gets_alone(server: Server, alone: dict[str, str]) -> None:
    assert len(set(alone.values())) == len(NAMES)
    streams = [(name, Stream(server, model=name)) for name in NAMES * 3]
    assert all(stream.result() == alone[name] for name, stream in streams)


def test_python_gives_the_servers_tokens(model: Path, places: dict[str, str], alone: dict[str, str]) -> None:
    options: dict[str, Any] = {"max_tokens": BODY["max_tokens"], "temperature": 0.0, "ignore_eos": True}
    with load(str(model), adapters=setting(places, "sql", "tone"), blas_threads=1) as loaded:
        for name in NAMES:
            chosen = {} if name == "default" else {"adapter": name}
            assert generate(loaded, str(BODY["prompt"]), **options, **chosen).text == alone[name]


def test_sdk_clients_name_adapters_as_models(server: Server) -> None:
    with server.openai() as client:
        assert [card.id for card in client.models.list()] == ["tiny", "sql", "tone"]
    texts = set()
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        for name in NAMES:
            message = client.messages.create(
                model=name,
                max_tokens=24,
                messages=[{"role": "user", "content": "hello"}],
                extra_body={"temperature": 0.0},  # the newest client has no name for it
            )
            assert message.model == ("tiny" if name == "default" else name)
            texts.add(message.content[0].text if message.content else "")  # type: ignore[union-attr]  # text only
    assert len(texts) == len(NAMES)


def test_a_chat_in_a_terminal_talks_with_the_adapter(server: Server, tmp_path: Path) -> None:
    options = ("--port", str(server.port), "--max-tokens", "12", "--temperature", "0")
    with Terminal(tmp_path, "chat", *options, "--adapter", "sql") as chat:
        chat.expect("sql at http.*> ")
        chat.type("hello")
        chat.expect(r"tokens/s.*> ")
        chat.ctrl_d()
        assert chat.end()[0] == 0
    with Terminal(tmp_path, "chat", *options, "--adapter", "sqll") as chat:
        chat.expect("> ")
        chat.type("hello")
        chat.expect("no model 'sqll' here.*'sql', 'tone'")


def test_kill_9_of_the_target_changes_no_token(server: Server, alone: dict[str, str]) -> None:
    for name in NAMES[1:]:
        stream, target = held_stream(server, model=name)
        others = [(other, Stream(server, model=other)) for other in NAMES]
        wait_in_engine(server, 1 + len(others))
        target.kill()
        assert stream.result() == alone[name]
        assert all(other.result() == alone[who] for who, other in others)


def test_metrics_tell_which_adapters_run(server: Server) -> None:
    target = hold(server)
    try:
        streams = [Stream(server, model=name) for name in NAMES]
        wait_in_engine(server, len(NAMES))
        page = httpx.get(f"{server.url}/metrics", timeout=10).text
        (line,) = (line for line in page.splitlines() if line.startswith("vllm:lora_requests_info{"))
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        assert labels["max_lora"] == "2"
        told = [
            name for where in ("running", "waiting") for name in labels[f"{where}_lora_adapters"].split(",") if name
        ]
        assert sorted(told) == ["sql", "tone"]
    finally:
        target.resume()
    assert all(stream.result() for stream in streams)
    assert server.metric("vllm:lora_requests_info", running_lora_adapters="", waiting_lora_adapters="") > 0


def test_cached_prefixes_are_an_adapters_own_also_on_ssd(model: Path, places: dict[str, str], tmp_path: Path) -> None:
    prompt = PROMPT * 2
    texts: dict[str, str] = {}
    for adapters, names in (("sql,tone", NAMES), ("tone,later", ("tone", "later", "default"))):
        with Server(model, tmp_path, adapters=setting(places, *adapters.split(","))) as server:
            for name in names:
                text, cached = ask(server, name, prompt)
                assert (cached > 0) == (name in texts), name
                assert texts.setdefault(name, text) == text
                again, cached = ask(server, name, prompt)
                assert again == text and cached > 60
            server.wait_for(lambda: server.metric("tandem:prefix_blocks", tier="ssd") >= 9, "written")


def test_other_adapters_are_loaded_without_a_new_connection(
    server: Server, model: Path, places: dict[str, str], alone: dict[str, str], tmp_path: Path
) -> None:
    def change(**body: Any) -> httpx.Response:
        body = {"model": str(model), "wait": True, **body}
        return httpx.post(f"{server.url}/v1/models/load", json=body, headers=ADMIN, timeout=READY_S)

    wrong = write_peft(tmp_path / "wrong", {"model.layers.0.self_attn.q_proj": (HIDDEN + 1, QUERIES)})
    for adapters, words in (
        ({"wrong": str(wrong)}, "numbers, the model's"),
        ({"absent": str(tmp_path / "absent")}, "nothing at"),
        ({"tiny": places["sql"]}, "a name of the model itself"),
        ({"a,b": places["sql"]}, "adapters: "),
    ):
        refused = change(adapters=adapters)
        assert refused.status_code == 400 and words in refused.json()["error"]["message"], refused.text
    assert ask(server, "sql")[0] == ask(server, "sql")[0]
    changed = change(adapters={"later": places["later"], "tone": places["tone"]})
    assert changed.status_code == 200, changed.text
    with server.openai() as client:
        assert [card.id for card in client.models.list()] == ["tiny", "later", "tone"]
    assert Stream(server, model="tone").result() == alone["tone"]
    assert Stream(server, model="default").result() == alone["default"]
    assert ask(server, "later")[0] != ask(server, "default")[0]
    gone = httpx.post(f"{server.url}/v1/completions", json={**BODY, "model": "sql"}, timeout=READY_S)
    assert gone.status_code == 404
    if IS_LONG:
        assert change().status_code == 200, "the same model again keeps them"
        assert Stream(server, model="tone").result() == alone["tone"]
        assert change(adapters={}).status_code == 200
        with server.openai() as client:
            assert [card.id for card in client.models.list()] == ["tiny"]


def test_a_server_with_a_bad_adapter_says_so_and_does_not_start(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path, adapters=f"sql={tmp_path / 'absent'}")
    server.start(wait=False)
    assert server.process is not None
    try:
        assert server.process.wait(READY_S) != 0
    finally:
        server.stop()
    assert "adapter 'sql': nothing at" in server.log.read_text()
