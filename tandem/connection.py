"""A running server as the commands reach it: where it is, which key opens it, and what went wrong in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import httpx

from shared.api_keys import load_keys
from shared.config import Settings
from shared.errors import Unavailable

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # what a server on all addresses is called by
CONNECT_S = 5.0
READ_S = 600.0  # a prompt may be long and a machine slow

_Command = TypeVar("_Command", bound=Callable[..., Any])


def server_options(command: _Command) -> _Command:
    """A decorator: `--url` and `--api-key`, for commands that talk to a server."""
    key = click.option("--api-key", metavar="KEY", help="Default: the first of the settings' API keys.")
    url = click.option("--url", help="Of a server elsewhere; default: by --host and --port.")
    return url(key(command))


def connect(settings: Settings, url: str | None, api_key: str | None) -> httpx.Client:
    """A client of the server at `url`, or of the one that these settings describe."""
    if url is None:
        host = _ANY_ADDRESS.get(settings.host, settings.host)
        url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
        keys = load_keys(settings) if api_key is None else []
        api_key = keys[0].key.decode() if keys else api_key
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        base = f"http://{base}"
    # Proxies of the environment are for the world outside; a model server is near.
    return httpx.Client(
        base_url=base, headers=headers, timeout=httpx.Timeout(READ_S, connect=CONNECT_S), trust_env=False
    )


def get(client: httpx.Client, path: str) -> httpx.Response:
    """Raises:
    Unavailable: nobody listens there, or the server refuses.
    """
    try:
        answer = client.get(path, timeout=CONNECT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(client, error) from error
    if answer.status_code not in (200, 503):  # 503: it is there, but has no target
        raise Unavailable(refusal(answer))
    return answer


def health(client: httpx.Client) -> dict[str, Any]:
    """What /health tells, also of a server that is not ready.

    Raises:
        Unavailable: nobody listens there, or another program does.
    """
    answer = get(client, "/health")
    try:
        told = answer.json()
    except ValueError:
        told = None
    if not isinstance(told, dict) or "scheduler" not in told:
        raise Unavailable(f"what answers at {client.base_url} is no Tandem server: see --port and --url")
    return told


def unreachable(client: httpx.Client, error: Exception) -> Unavailable:
    """Nobody listens, or the connection broke: what to do about it."""
    if isinstance(error, httpx.TimeoutException):
        return Unavailable(f"the server at {client.base_url} does not answer in time: see its log")
    mend = "start one with `tandem serve`, or say where it is with --port or --url"
    return Unavailable(f"no server answers at {client.base_url}: {mend}")


def refusal(answer: httpx.Response) -> str:
    """What a server's error says, in one line."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    hint = " (--api-key)" if answer.status_code == httpx.codes.UNAUTHORIZED else ""
    return f"the server answered {answer.status_code}: {' '.join(str(message).split())}{hint}"
