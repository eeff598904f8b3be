"""Starting and stopping servers under comparison, with a stand-in server."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from bench import peers
from bench.peers import Arm, Load, make_loads, markdown, serving

SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = os.environ["WORD"].encode()
        self.send_response(int(os.environ.get("STATUS", "200")) if self.command == "POST" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = answer
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def arm(script: str = SERVER, **environment: str) -> Arm:
    return Arm(name="stand-in", command=("{python}", "-c", script, "{port}"), package="none", environment=environment)


def loads(*options: str) -> list[Load]:
    return make_loads(peers._parser().parse_args(options))


def test_server_is_ready_inside_and_gone_after() -> None:
    folder = Path("/a/model")
    with tempfile.TemporaryFile() as log:
        with serving(arm(WORD="{folder}"), Path(sys.executable), folder, {}, log) as target:
            assert httpx.get(target.url + "/health", trust_env=False).text == "/a/model"
            assert target.model == "/a/model"
        with pytest.raises(httpx.ConnectError):
            httpx.get(target.url + "/health", trust_env=False)


@pytest.mark.parametrize(
    ("stand_in", "words"),
    [
        (arm("raise SystemExit(3)", WORD=""), "ended with 3 before it was ready"),
        (arm(WORD="no model", STATUS="500"), "first answer was 500: no model"),
    ],
)
def test_a_server_that_cannot_start_says_why(stand_in: Arm, words: str) -> None:
    with (
        tempfile.TemporaryFile() as log,
        pytest.raises(RuntimeError, match=words),
        serving(stand_in, Path(sys.executable), Path("/m"), {}, log),
    ):
        pytest.fail("the body must not run")


def test_loads_do_not_depend_on_which_others_are_played() -> None:
    assert loads("--loads", "mixed", "--concurrency", "8") == loads("--concurrency", "8")[-1:]


def test_shared_load_is_one_cold_wave() -> None:
    (shared,) = loads("--loads", "shared", "--concurrency", "8", "--requests-per-slot", "3")
    assert (shared.shape.num_requests, shared.shape.shared_prefix) == (8, 600)


def test_unknown_arms_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers._parser().parse_args(["--arms", "tandem,other"])
    assert "--arms" in capsys.readouterr().err


def test_an_arm_that_failed_keeps_its_row_in_the_table() -> None:
    head = {"date": "d", "machine": {"cpu": "c", "cores": 2, "gpu": None}, "blas": None, "blas_threads": None}
    head |= {"model": "m", "commit": "x", "command": "y", "arms": {"tandem": "this commit"}}
    text = markdown([{"arm": "tandem", "load": "mixed c=8", "repeat": 0, "failed": "RuntimeError: no"}], head)
    assert "## mixed c=8" in text
    assert "RuntimeError: no" in text
