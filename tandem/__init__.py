"""Tandem's public surface: the `tandem` command line and the Python API.

    from tandem import load, generate, stream_generate     # a model in this process
    from tandem import Client, AsyncClient                 # a running server

Importing this costs nothing: what a name needs is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.errors import TandemError
    from tandem.api import generate, load, stream_generate
    from tandem.client import AsyncClient, Client
    from tandem.local.model import LocalModel
    from tandem.local.stream import PieceStream
    from tandem.results import Piece, Result, Stats, Token, ToolCall

_PLACES = {
    "load": "tandem.api",
    "generate": "tandem.api",
    "stream_generate": "tandem.api",
    "Client": "tandem.client",
    "AsyncClient": "tandem.client",
    "LocalModel": "tandem.local.model",
    "PieceStream": "tandem.local.stream",
    "Piece": "tandem.results",
    "Result": "tandem.results",
    "Stats": "tandem.results",
    "Token": "tandem.results",
    "ToolCall": "tandem.results",
    "TandemError": "shared.errors",
}

__all__ = [
    "AsyncClient",
    "Client",
    "LocalModel",
    "Piece",
    "PieceStream",
    "Result",
    "Stats",
    "TandemError",
    "Token",
    "ToolCall",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the names above, whose types a checker sees there
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return sorted(__all__)
