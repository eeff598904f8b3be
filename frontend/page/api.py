"""GET /ui/: the chat page. Its files lie in this package and are read once, at start.

Plain ES modules and one stylesheet: nothing is built, nothing is fetched from other hosts, and the policy below lets
the page load and call nothing but this server. Text of a model never becomes markup, so the policy is a second wall.
"""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

INDEX = "index.html"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asks each time; the answer is a 304 until the server is a newer one
}


@dataclass(frozen=True)
class File:
    content: bytes
    media_type: str
    etag: str


def read_files() -> dict[str, File]:
    """Every file of the page by its name."""
    files = {}
    for entry in resources.files("frontend.page").joinpath("static").iterdir():
        if not entry.is_file():
            continue
        content = entry.read_bytes()
        # Not left to the machine's tables: some give text/plain for .js, which browsers refuse to run as a module.
        known = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
        suffix = entry.name.rpartition(".")[2]
        media_type = known.get(suffix) or mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
        files[entry.name] = File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return files


def is_page_path(path: str) -> bool:
    """Whether this is one of the page's own files, which need no API key: what the page calls does."""
    return path == "/ui" or path.startswith("/ui/")


def page_router() -> APIRouter:
    files = read_files()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/ui", methods=["GET", "HEAD"])
    async def without_slash() -> Response:
        """The page's files are named relative to its folder. So is this, for servers behind a proxy's prefix."""
        return Response(status_code=307, headers={**HEADERS, "location": "ui/"})

    @router.api_route("/ui/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return answer(request, files[INDEX])

    @router.api_route("/ui/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "Not Found")
        return answer(request, files[name])

    return router


def answer(request: Request, file: File) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
