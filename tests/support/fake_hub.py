"""As much of a model hub as `snapshot_download` asks for, with one model that is large or never comes to its end."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _oid(file: Path) -> str:
    """A stand-in for git's name of a file's content."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Serves the files of a folder as the repository `org/tiny`.

    Args:
        stops_at: the weights' download stays open after so many bytes; None: it goes through.
    """

    daemon_threads = True

    def __init__(self, folder: Path, stops_at: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.stops_at = stops_at
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(self.server.folder.iterdir())
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                }
                for f in files
            ]
            self._send(json.dumps(entries).encode(), is_head=is_head)
            return
        if path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": file.name} for file in files]
            found = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(found).encode(), is_head=is_head)
            return
        file = self.server.folder / path.rpartition("/")[2]
        if not path.startswith("/org/tiny/resolve/") or not file.is_file():
            self.send_response(404)
            self.send_header("x-error-code", "RepoNotFound")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self._send(file.read_bytes(), is_head=is_head, is_weights=file.suffix == ".safetensors")

    def _send(self, content: bytes, *, is_head: bool, is_weights: bool = False) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if is_head:
            return
        stops_at = self.server.stops_at if is_weights else None
        self.wfile.write(content[:stops_at])
        self.wfile.flush()
        if stops_at is not None:
            self.server.closing.wait(120)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is for failures."""
