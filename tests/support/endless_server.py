"""A stand-in for a server whose answers do not end: what Ctrl-C stops can be told apart from what was over anyway."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TIMINGS = {
    "prompt_n": 3, "cache_n": 64, "prompt_ms": 250.0, "prompt_per_second": 12.0, "predicted_n": 4,
    "predicted_ms": 200.0, "predicted_per_second": 20.0, "queue_ms": 50.0, "draft_n": 5, "draft_n_accepted": 3,
}  # fmt: skip


class EndlessServer(ThreadingHTTPServer):
    """Streams words until the client leaves; "short" gets a whole answer, "fail" an error, "think" reasoning first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.left = threading.Event()  # a client closed the connection in the middle of an answer
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> EndlessServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: EndlessServer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {"status": "ok", "model": "fake", "scheduler": "ready"})
        else:
            self._json(404, {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "not here"}})
            return
        self.server.requests.append(body)
        content = body["messages"][-1]["content"]
        if content == "fail":
            self._json(400, {"error": {"message": "messages: refused\nby the test"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            if content == "think":
                self._delta(reasoning_content="let me see")
            if content in ("short", "think") or isinstance(content, list):
                self._delta(content="a \x1b]0;title\x07short answer")
                self._event({"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": TIMINGS})
                return
            gone = threading.Event()
            while not gone.wait(0.02):  # the pace of a model, not a wait for something
                self._delta(content="word ")
        except OSError:
            self.server.left.set()

    def _delta(self, **delta: str) -> None:
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is for failures."""
