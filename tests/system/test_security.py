"""Defaults and defences of the real processes: where they listen, what they fetch, what they log, what they believe."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.frontend.media.test_fetch import TRICKS, Web
from tests.frontend.test_media import huge_png
from tests.support import tiny_model
from tests.support.server import Server
from tests.system.test_media import uri

pytestmark = [pytest.mark.system, pytest.mark.mlx]

ALLOWED = "127.0.0.3"  # the only address that may be fetched from
SECRETS = {"api_keys": "a-secret-key", "admin_key": "the-admins-own-key"}
PRIVATE_WORDS = "my medical history"
BOMB_BYTES = 200 * 1024 * 1024  # of what it would unpack to, 2.7 GB
HEADERS = {"authorization": f"Bearer {SECRETS['api_keys']}"}


def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[type[Web], int]]:
    """Answers on every loopback address, whichever of them is allowed."""
    handler = type("Handler", (Web,), {"seen": [], "answers": {"/picture": (200, {}, picture())}})
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield handler, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """URLs are allowed, and one address besides; everything is logged."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "link").symlink_to("/etc/passwd")
    (folder / "pictures" / "good").write_bytes(picture())
    model = tiny_model.write_qwen2_vl(folder / "tiny")
    with Server(
        model, folder, allow_media_urls=1, media_hosts=f"{ALLOWED}/32", media_timeout_s=3, log_level="debug",
        media_roots=folder / "pictures", **SECRETS,
    ) as running:  # fmt: skip
        yield running


def ask(server: Server, url: str, **more: Any) -> httpx.Response:
    content = [{"type": "text", "text": PRIVATE_WORDS}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)


def test_it_listens_on_loopback_alone_and_its_run_folder_is_private(guarded: Server) -> None:
    assert "TANDEM_HOST" not in guarded.environment
    listening = {
        connection.laddr[:2]
        for process in guarded.tree()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", guarded.port)}
    assert guarded.run_dir.stat().st_mode & 0o777 == 0o700


def test_pages_of_other_origins_may_not_read(guarded: Server) -> None:
    asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/health")):
        answer = httpx.request(method, guarded.url + path, headers=HEADERS | asked)
        assert not [name for name in answer.headers if name.startswith("access-control-")], (method, path)


def test_no_trick_reaches_another_address_and_nothing_local(guarded: Server, web: tuple[type[Web], int]) -> None:
    """Names of `.test` that only a resolver of ours could answer are those of `tests/frontend/media/test_fetch.py`."""
    handler, port = web
    tricks = {name: url for name, url in TRICKS.items() if not name.startswith("name ")}
    assert len(tricks) >= 40
    hosts = ("127.0.0.1", "127.0.0.2", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]",
             "0.0.0.0", "[::ffff:127.0.0.1]", f"{ALLOWED}@127.0.0.1", f"{ALLOWED}%40127.0.0.1")  # fmt: skip
    tricks |= {host: f"http://{host}:{port}/picture" for host in hosts}
    redirects = [f"http://{host}:{port}/picture" for host in hosts] + ["file:///etc/passwd", "gopher://127.0.0.1:1/"]
    for i, location in enumerate(redirects):
        handler.answers[f"/redirect{i}"] = (302, {"location": location}, b"")
        tricks[f"redirect to {location}"] = f"http://{ALLOWED}:{port}/redirect{i}"
    folder = guarded.environment["TANDEM_MEDIA_ROOTS"]
    tricks |= {
        "link": f"{folder}/link",
        "dots": f"file://{folder}/%2e%2e/tiny/config.json",
        "proc": "/proc/self/environ",
    }
    with httpx.Client(headers=HEADERS, timeout=60) as client:
        for name, url in tricks.items():
            content = [{"type": "image_url", "image_url": {"url": url}}]
            body = {"model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
            answer = client.post(f"{guarded.url}/v1/chat/completions", json=body)
            assert answer.status_code == 400, f"{name}: {answer.status_code} {answer.text}"
            assert "root:" not in answer.text and "api_keys" not in answer.text.lower(), name
    assert {address for address, *_ in handler.seen} <= {ALLOWED}
    for good in (f"http://{ALLOWED}:{port}/picture", f"{folder}/good"):
        assert ask(guarded, good).status_code == 200, "nothing is fetched at all"
    assert handler.seen[-1][0] == ALLOWED


def test_a_picture_that_would_unpack_to_gigabytes_takes_no_memory(guarded: Server) -> None:
    frontend = guarded.worker("frontend")
    before = frontend.memory_info().rss
    for _ in range(4):
        answer = ask(guarded, uri(huge_png()))
        assert answer.status_code == 400 and "30000 x 30000" in answer.text
    assert guarded.worker("frontend") == frontend
    assert frontend.memory_info().rss - before < BOMB_BYTES
    gzipped = {**HEADERS, "content-encoding": "gzip", "content-type": "application/json"}
    answer = httpx.post(f"{guarded.url}/v1/chat/completions", content=b"\x1f\x8b" + bytes(100), headers=gzipped)
    assert answer.status_code == 400


def test_no_process_logs_prompts_answers_or_keys_even_at_debug(guarded: Server) -> None:
    answer = ask(guarded, uri(picture()), max_tokens=30, ignore_eos=True)
    assert answer.status_code == 200
    assert ask(guarded, uri(picture()), unknown=PRIVATE_WORDS).status_code == 400
    wrong = {"authorization": f"Bearer {SECRETS['api_keys']}x"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=wrong).status_code == 401
    assert httpx.delete(f"{guarded.url}/v1/cache", headers=wrong).status_code == 403
    log = guarded.log.read_text()
    assert "/v1/chat/completions" in log, "requests are logged at debug"
    for private in (PRIVATE_WORDS, *SECRETS.values(), answer.json()["choices"][0]["message"]["content"][:20]):
        assert private not in log


def test_code_of_a_model_is_never_run(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path, trust_remote_code=1).start(wait=False)
    assert server.process is not None
    assert server.process.wait(timeout=30) == 78
    assert "trust-remote-code is not supported" in server.log.read_text()
