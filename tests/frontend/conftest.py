"""A real uvicorn server on loopback, in a thread of its own, in front of a fake engine."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import hypothesis
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from frontend.engine import EngineClient
from frontend.media.loader import MediaLoader
from frontend.model_side import ModelSide
from frontend.server import Server
from frontend.service import Service
from frontend.tokenizer import ModelText, load
from shared.config import Settings
from shared.model_files import resolve
from tests.support.fake_engine import FakeEngine

# The machine is shared with whatever else runs, so a slow example proves nothing.
hypothesis.settings.register_profile("frontend", deadline=None)
hypothesis.settings.load_profile("frontend")

# As ChatML does it; ids below 3 are special in the byte tokenizer too.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Every byte is one token, ids 3..258; a text's tokens are its bytes, so tests can write outputs by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


TOKENIZER = byte_tokenizer()
EOS = 2


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text).ids
    return encoded


def byte_text(**overrides: object) -> ModelText:
    values: dict[str, object] = {
        "tokenizer": TOKENIZER,
        "chat_template": TEMPLATE,
        "special_texts": {"eos_token": "<|im_end|>"},
        "eos_token_ids": [EOS],
        "sampling_defaults": {},
    }
    return ModelText(**(values | overrides))  # type: ignore[arg-type]  # a test's own keywords


class RunningServer:
    """A frontend serving in a thread, with clients for it."""

    def __init__(
        self, settings: Settings, text: ModelText, *, lost_limit_s: float = 60.0, media: MediaLoader | None = None
    ) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.engine_client = EngineClient(settings, lost_limit_s=lost_limit_s)
        self.service = Service(settings, ModelSide(settings, "Fake-1B", text, media), self.engine_client)
        self.server = Server(self.service)
        self.thread = threading.Thread(target=self._serve, name="frontend server", daemon=True)
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self.thread.start()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            self.loop = runner.get_loop()
            runner.run(self.server.serve(sockets=[self.listener]))

    def openai(self, **options: object) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)  # type: ignore[arg-type]  # a test's own keywords

    def wait_status(self, path: str, status: int, timeout_s: float = 10.0) -> httpx.Response:
        """Ask until `path` answers with `status`: a state that only the server can tell."""
        response = self.http.get(path)
        event = threading.Event()
        for _ in range(int(timeout_s / 0.02)):
            if response.status_code == status:
                return response
            event.wait(0.02)
            response = self.http.get(path)
        raise AssertionError(f"{path} still answers {response.status_code}: {response.text}")

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive(), "the server did not stop"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        run_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), heartbeat_interval_s=0.2, heartbeat_timeout_s=2.0
    )


@pytest.fixture
def engine(settings: Settings) -> Iterator[FakeEngine]:
    with FakeEngine(settings.engine_endpoint) as running:
        yield running


@pytest.fixture
def start_server(settings: Settings) -> Iterator[Callable[..., RunningServer]]:
    servers: list[RunningServer] = []

    def start(text: ModelText | None = None, **options: object) -> RunningServer:
        chosen = options.pop("settings", settings)
        servers.append(RunningServer(chosen, text or byte_text(), **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(engine: FakeEngine, start_server: Callable[..., RunningServer]) -> RunningServer:
    """A server whose fake engine is ready."""
    running = start_server()
    running.wait_status("/health", 200)
    return running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.openai() as sdk:
        yield sdk


@pytest.fixture(scope="session")
def embedded_text() -> ModelText:
    settings = Settings()
    return load(resolve("default", settings))
