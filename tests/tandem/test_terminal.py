"""Commands in a real terminal without a real server: chat, pull, bench and status, and Ctrl-C in the middle of each."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.supervise import EXIT_CONFIG
from tests.support import tiny_model
from tests.support.endless_server import EndlessServer
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.terminal import PATIENCE_S, Terminal, tandem

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def server() -> Iterator[EndlessServer]:
    with EndlessServer() as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


def test_a_chat_shows_answers_reasoning_and_speed_and_keeps_what_was_said(
    server: EndlessServer, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with Terminal(tmp_path, "chat", "--url", server.url, "--system", "Be brief.", "--max-tokens", "9") as chat:
        chat.expect("fake at .*> ")
        chat.type("short")
        shown = chat.expect("> ")
        assert "a ]0;titleshort answer" in shown  # without the controls that would set the terminal's title
        assert "[4 tokens, 20.0 tokens/s, drafts accepted 3 of 5 (60%), 64 prompt tokens cached" in shown
        assert "first token in 0.30 s]" in shown
        chat.type("think")
        assert "\x1b[2mlet me see" in chat.expect("> ")  # dim
        chat.type("fail")
        assert "tandem: the server answered 400: messages: refused by the test" in chat.expect("> ")
        chat.type("/image a.png")
        chat.expect("4 bytes")
        chat.type("/image b.png")
        assert "b.png: No such file" in chat.expect("> .*> ")
        chat.type("look")
        chat.expect("tokens/s")
        chat.type("/clear")
        chat.expect("cleared")
        chat.type("/nothing")
        chat.expect("/nothing is no command; /help lists them")
        chat.type("/system")
        chat.type("short")
        chat.expect("tokens/s")
        chat.expect("> ")  # who types Ctrl-D before a prompt is there types into the terminal's own buffer
        chat.ctrl_d()
        assert chat.end()[0] == 0
    first, second, failed, seen, last = (request["messages"] for request in server.requests)
    system = {"role": "system", "content": "Be brief."}
    answered = {"role": "assistant", "content": "a \x1b]0;title\x07short answer"}
    assert first == [system, {"role": "user", "content": "short"}]
    assert second == [*first, answered, {"role": "user", "content": "think"}]
    assert failed[-1]["content"] == "fail"
    assert failed[-1] not in seen  # a refused message is forgotten
    assert seen[-1]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
        {"type": "text", "text": "look"},
    ]
    assert last == [{"role": "user", "content": "short"}]
    assert server.requests[0]["max_tokens"] == 9 and "temperature" not in server.requests[0]


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: EndlessServer, tmp_path: Path) -> None:
    with Terminal(tmp_path, "chat", "--url", server.url) as chat:
        chat.expect("> ")
        chat.type("tell me")
        chat.expect("word word")
        chat.ctrl_c()
        chat.expect(r"\[stopped\]")
        assert server.left.wait(PATIENCE_S)
        chat.expect("> ")
        chat.ctrl_c()
        chat.expect("/quit or Ctrl-D")
        chat.expect("> ")
        chat.type("short")
        chat.expect("20.0 tokens/s")
        chat.type("/quit")
        assert chat.end()[0] == 0
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1]["content"].startswith("word word")


def test_a_chat_whose_server_is_not_there_is_told_so(tmp_path: Path) -> None:
    code, said = tandem(tmp_path, "chat", "--url", NOBODY)
    assert code == 1
    assert said.count("\n") == 1 and f"no server answers at {NOBODY}" in said


def test_pull_shows_progress_and_tells_where_the_files_are(model: Path, tmp_path: Path) -> None:
    with FakeHub(model) as hub:
        code, said = tandem(tmp_path, "pull", "org/tiny", HF_ENDPOINT=hub.url)
        assert code == 0
        assert "Downloading: 100%" in said
        assert said.splitlines()[-1].endswith(f"snapshots/{COMMIT}")  # below the bar, not in it
        code, said = tandem(tmp_path, "pull", "org/none", HF_ENDPOINT=hub.url)
        assert code == EXIT_CONFIG
        assert said.count("\n") == 1 and "the hub has no model 'org/none'" in said and "HF_TOKEN" in said
    # What is there needs no network; what is not, is told in one line.
    code, said = tandem(tmp_path, "fetch", "org/tiny", HF_ENDPOINT=NOBODY)
    assert code == 0 and f"snapshots/{COMMIT}" in said
    code, said = tandem(tmp_path, "pull", "org/other", HF_ENDPOINT=NOBODY)
    assert code == EXIT_CONFIG
    assert said.count("\n") == 1 and "'org/other' is not on this machine and the hub cannot be reached" in said


def test_ctrl_c_in_the_middle_of_a_pull(model: Path, tmp_path: Path) -> None:
    with FakeHub(model, stops_at=5000) as hub, Terminal(tmp_path, "pull", "org/tiny", HF_ENDPOINT=hub.url) as pull:
        pull.expect("%")
        pull.ctrl_c()
        code, said = pull.end()
    assert code == 130
    assert "Traceback" not in said


def test_a_full_disk_in_the_middle_of_a_pull(model: Path, tmp_path: Path) -> None:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # as the last bytes of a disk: writing fails

    assert (model / "model.safetensors").stat().st_size > 100_000
    with FakeHub(model) as hub, Terminal(tmp_path, "pull", "org/tiny", preexec=fill, HF_ENDPOINT=hub.url) as pull:
        code, said = pull.end()
    assert code == EXIT_CONFIG
    assert "tandem: the disk is full, 'org/tiny' is not complete: free some space" in said
    assert "Traceback" not in said


def test_ctrl_c_in_the_middle_of_a_benchmark(server: EndlessServer, tmp_path: Path) -> None:
    with Terminal(tmp_path, "bench", "serve", "--url", server.url, "--num-requests", "4", "--warmup", "0") as bench:
        bench.expect("0/4")
        bench.ctrl_c()
        code, said = bench.end()
    assert code == 130
    assert "Traceback" not in said
