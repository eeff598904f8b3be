"""Fetches what a request's media URL points to, without letting the request choose where this machine connects.

The host is resolved first, every address is checked, and the connection goes to the checked address: a second answer of
the name server (DNS rebinding) is never asked for. Each redirect is a new URL and passes the same checks.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx

from frontend.media.addresses import Allowed, ForbiddenHost, is_host_name, literal, parse_allowed
from frontend.media.files import read_file
from shared.config import Settings
from shared.errors import InvalidRequest

MAX_REDIRECTS = 3
MAX_URL_CHARS = 8192
_PORTS = {"http": 80, "https": 443}
_URL_CHARS = frozenset(map(chr, range(0x21, 0x7F))) - set('\\"<>^`{|}')

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> all its addresses as text."""


class _Target:
    """A URL taken apart and found to be unambiguous."""

    def __init__(self, url: str) -> None:
        """Raises ForbiddenHost where two readers could see two hosts in it."""
        if len(url) > MAX_URL_CHARS or not set(url) <= _URL_CHARS:
            raise ForbiddenHost("the URL is too long or has characters that need escapes")
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ForbiddenHost("the URL is malformed") from error
        self.scheme = parts.scheme.lower()
        if self.scheme not in _PORTS:
            raise ForbiddenHost("only http and https URLs can be fetched")
        if "@" in parts.netloc or "%" in parts.netloc or parts.netloc.endswith(":") or port == 0:
            raise ForbiddenHost("user names, escapes and empty ports in a URL's host are not accepted")
        host = (parts.hostname or "").lower()
        self.literal = literal(host)
        if (self.literal is None and not is_host_name(host)) or (":" in host) != parts.netloc.startswith("["):
            raise ForbiddenHost("the host is neither a name nor an address in its usual spelling")
        self.host = self.literal or host.rstrip(".")
        self.port = port or _PORTS[self.scheme]
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    @property
    def is_usual_port(self) -> bool:
        return self.port == _PORTS[self.scheme]

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.is_usual_port else f"{host}:{self.port}"


async def resolve(host: str, port: int) -> list[str]:
    """The system's resolver, in a thread."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


async def fetch(url: str, settings: Settings, *, param: str | None = None, resolve: Resolve = resolve) -> bytes:
    """The bytes behind an http, https or file URL, or a local path.

    Args:
        param: the request's field, for errors.
        resolve: all addresses of a host.
    Raises:
        InvalidRequest: the server does not allow this, or nothing came within the limits. The text does not tell
            where the URL led, so that refusals cannot be used to look around.
    """
    if url.startswith("/") or url[:5].lower() == "file:":
        roots = [Path(root) for root in settings.media_roots.split(",") if root.strip()]
        path = _path_of(url, param)
        return await asyncio.to_thread(read_file, path, roots, settings.media_max_bytes, param)
    allowed = parse_allowed(settings.allow_media_urls, settings.media_hosts)
    if allowed.is_nothing:
        text = "fetching URLs is off on this server (TANDEM_ALLOW_MEDIA_URLS, TANDEM_MEDIA_HOSTS); send the data itself"
        raise InvalidRequest(text, param=param)
    try:
        async with asyncio.timeout(settings.media_timeout_s):
            return await _fetch_following(url, allowed, settings.media_max_bytes, resolve)
    except ForbiddenHost as error:
        raise InvalidRequest(f"this URL is not fetched: {error}", param=param) from error
    except TimeoutError as error:
        raise InvalidRequest(f"the URL gave no answer within {settings.media_timeout_s:g} s", param=param) from error
    except (httpx.HTTPError, OSError, UnicodeError) as error:
        raise InvalidRequest("the URL cannot be fetched", param=param) from error


def _path_of(url: str, param: str | None) -> str:
    if url.startswith("/"):
        return url
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InvalidRequest("the file URL is malformed", param=param) from error
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise InvalidRequest("a file URL is file:///path", param=param)
    return urllib.parse.unquote(parts.path)


async def _fetch_following(url: str, allowed: Allowed, max_bytes: int, resolve: Resolve) -> bytes:
    """Follows redirects. Raises ForbiddenHost, httpx.HTTPError, OSError."""
    for _ in range(MAX_REDIRECTS + 1):
        target = _Target(url)
        addresses = [target.literal] if target.literal is not None else await resolve(target.host, target.port)
        address = allowed.check(target.host, addresses, target.is_usual_port)
        found = await _get(target, address, max_bytes)
        if isinstance(found, bytes):
            return found
        base = f"{target.scheme}://{target.authority}{target.path}"
        try:
            url = urllib.parse.urljoin(base, found.url)
        except ValueError as error:
            raise ForbiddenHost("it redirects to a malformed URL") from error
        if target.scheme == "https" and not url.lower().startswith("https:"):
            raise ForbiddenHost("it redirects from https to something else")
    raise ForbiddenHost(f"it redirects more than {MAX_REDIRECTS} times")


class _Redirect:
    def __init__(self, url: str) -> None:
        self.url = url


async def _get(target: _Target, address: str, max_bytes: int) -> bytes | _Redirect:
    """One request to `address`, whatever its name resolves to by now; the name is only told to the other side."""
    url = httpx.URL(scheme=target.scheme, host=address, port=target.port, raw_path=target.path.encode("ascii"))
    headers = {"host": target.authority, "accept": "image/*, audio/*, video/*", "accept-encoding": "identity"}
    request = httpx.Request("GET", url, headers=headers, extensions={"sni_hostname": target.host})
    # A client of its own for each: no cookies, no proxies of the environment, no connection that others can use.
    async with httpx.AsyncClient(verify=_tls(), trust_env=False, timeout=None) as client:  # noqa: S113 - fetch has one
        response = await client.send(request, stream=True)
        try:
            if response.has_redirect_location:
                return _Redirect(response.headers["location"])
            if response.status_code != 200:
                raise ForbiddenHost(f"the answer has status {response.status_code}")
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise ForbiddenHost("the answer is compressed")
            return await _read(response, max_bytes)
        finally:
            await response.aclose()


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    too_large = ForbiddenHost(f"the answer is larger than {max_bytes} bytes")
    if int(response.headers.get("content-length", "0") or "0") > max_bytes:
        raise too_large
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reading the certificate authorities takes 20 ms."""
    return httpx.create_ssl_context(trust_env=False)
