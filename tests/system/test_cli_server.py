"""Commands in a real terminal with a real server: chat, status, restart, doctor, and a chat that starts its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.server import Server
from tests.support.terminal import Terminal, tandem

pytestmark = [pytest.mark.system, pytest.mark.mlx]


@contextmanager
def busy_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def ask(server: Server, text: str) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "ignore_eos": True}, timeout=60)
    assert answer.status_code == 200, answer.text


def test_status_tells_what_the_server_counted(server: Server, tmp_path: Path) -> None:
    port = str(server.port)
    for _ in range(2):
        ask(server, "one two one two one two one two one two one two one two one two")
    code, said = tandem(tmp_path, "status", "--json", "--port", port, "--interval", "0.1")
    assert code == 0
    status = json.loads(said)
    assert (status["model"], status["status"], status["num_slots"], status["device"]) == ("tiny", "ok", 16, "cpu")
    assert {process["name"]: process["state"] for process in status["processes"]} == dict.fromkeys(
        ("frontend", "scheduler", "target", "drafter"), "ready"
    )
    assert status["output_tokens"] == server.metric("vllm:generation_tokens_total") == 48
    queried, hit = server.metric("vllm:prefix_cache_queries_total"), server.metric("vllm:prefix_cache_hits_total")
    assert status["cache_hit_rate"] == pytest.approx(hit / queried) and hit > 0
    assert status["ttft_ms"] > 0 and status["itl_ms"] > 0 and status["output_tokens_per_s"] == 0
    code, said = tandem(tmp_path, "status", "--once", "--port", port, "--interval", "0.1")
    assert code == 0
    for shown in ("tiny at http://", "target", "ready", "0 of 16 slots", "output tokens/s", "acceptance", "cache hits"):
        assert shown in said


def test_status_is_live_until_ctrl_c(server: Server, tmp_path: Path) -> None:
    with Terminal(tmp_path, "ps", "--port", str(server.port), "--interval", "0.1") as status:
        for _ in range(3):
            status.expect("throughput")
        status.ctrl_c()
        code, said = status.end()
    assert code == 130
    assert "Traceback" not in said


def test_a_chat_with_the_server_that_runs(server: Server, tmp_path: Path) -> None:
    with Terminal(tmp_path, "chat", "--port", str(server.port), "--max-tokens", "12", "--temperature", "0") as chat:
        chat.expect("tiny at http.*> ")
        chat.type("hello")
        chat.expect(r"tokens/s.*drafts")
        chat.expect("> ")
        chat.type("/image nothing.png")
        chat.expect("No such file")
        chat.expect("> ")
        chat.ctrl_d()
        assert chat.end()[0] == 0


def test_restart_replaces_the_process(server: Server, tmp_path: Path) -> None:
    before = server.worker("workers.drafter").pid
    port = str(server.port)
    code, said = tandem(tmp_path, "restart", "drafter", "--port", port, "--run-dir", str(server.run_dir))
    assert code == 0 and "drafter restarts" in said
    server.wait_for(lambda: not psutil.pid_exists(before), "replaced")
    server.wait_for(lambda: httpx.get(f"{server.url}/health").json()["drafter"] == "ready", "ready again")
    assert server.worker("workers.drafter").pid != before


def test_a_second_server_on_the_port_names_the_first_one(server: Server, tmp_path: Path) -> None:
    code, said = tandem(tmp_path, "serve", "--port", str(server.port), "--model", str(tmp_path))
    assert code == 1
    assert f"is in use by process {server.worker('frontend').pid} (" in said and "-m frontend" in said
    assert "--port" in said and said.count("\n") == 1


def test_every_process_of_a_server_runs_with_the_settings_of_the_file(model: Path, tmp_path: Path) -> None:
    """Started in the folder of the file, with a model named relative to it; Ctrl-C ends it with code 0."""
    (tmp_path / "mine").symlink_to(model)
    with busy_port() as port:
        pass  # free from here on
    (tmp_path / "tandem.toml").write_text(f'model = "mine"\nport = {port}\nmax_num_seqs = 3\nmodel_name = "ours"\n')
    with Terminal(tmp_path, "serve") as serve:
        serve.expect("Tandem is ready on ")
        health = httpx.get(f"http://127.0.0.1:{port}/health", timeout=10).json()
        assert (health["num_slots"], health["model"]) == (3, "ours")  # the target's word, and the frontend's
        serve.ctrl_c()
        code, said = serve.end()
    assert code == 0
    assert "Traceback" not in said


def test_a_chat_starts_a_server_for_a_model_that_is_named_and_takes_it_along(model: Path, tmp_path: Path) -> None:
    with Terminal(tmp_path, "run", str(model), "--max-tokens", "8", TANDEM_API_KEYS="key-of-the-environment") as chat:
        chat.expect(f"starting a server with {model}")
        chat.expect(r"tiny at http://127\.0\.0\.1:(\d+)")
        children = psutil.Process(chat.child.pid).children(recursive=True)
        assert len(children) >= 9  # honcho, and a supervisor and a child for each of four processes
        chat.type("hello")
        chat.expect("tokens/s")
        chat.type("/quit")
        assert chat.end()[0] == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_chat_with_a_model_that_is_not_there(tmp_path: Path) -> None:
    code, said = tandem(tmp_path, "run", "./nothing")
    assert code == 1
    assert "the server did not become ready: no model at" in said and "nothing" in said
    assert "Traceback" not in said


def test_doctor_checks_and_generates_and_a_busy_port_is_a_failure(model: Path, tmp_path: Path) -> None:
    with busy_port() as port:
        code, said = tandem(tmp_path, "doctor", "--model", str(model), "--port", str(port), "--json")
    assert code == 1
    found = {line["name"]: line for line in json.loads(said)}
    assert found["port"]["level"] == "fail" and "--port" in found["port"]["mend"]
    assert found["self-test"]["level"] == "ok", found
    assert "tiny in float32" in found["self-test"]["text"] and "equal to a plain forward" in found["self-test"]["text"]
    assert {"machine", "MLX", "open files", "memory", "disk", "BLAS", "attention"} <= set(found)
    assert "GFLOP/s" in found["BLAS"]["text"]


def test_doctor_tells_why_a_model_cannot_be_loaded(tmp_path: Path) -> None:
    code, said = tandem(tmp_path, "doctor", "--model", "./nothing", "--port", "0")
    assert code == 1
    assert "fail" in said and f"no model at '{tmp_path}/nothing'" in said
