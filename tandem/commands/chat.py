"""`tandem chat` (and `run`): a conversation in the terminal."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
import httpx

from shared.config import FIELDS
from shared.errors import InvalidRequest, TandemError, Unavailable
from tandem.connection import connect, health, server_options
from tandem.conversation import Conversation, summary
from tandem.layers import DEFAULT, Effective
from tandem.own_server import own_server
from tandem.setting_options import setting_options

HELP = """/image PATH ...   put images beside the next message
/system TEXT      set the system prompt; without TEXT: none
/clear            forget the conversation
/help             this text
/quit             end, as Ctrl-D does; Ctrl-C stops an answer"""
_QUIT = frozenset({"/quit", "/exit", "/bye"})
_PROMPT = "> "
# Controls that a model's output could steer a terminal with; tab and line feed are text.
_CONTROLS = dict.fromkeys([*(i for i in range(32) if i not in (9, 10)), *range(127, 160)])
_FOR_SERVER = ("model", "adapters", "draft_model", "cache_dir")


@click.command()
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--adapter", metavar="NAME", help="A LoRA adapter of the server to talk with.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--image", "images", metavar="PATH", multiple=True, type=click.Path(), help="Beside the first message.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Default: the model's own.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Default: the model's own.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of each answer.")
@click.option("--seed", type=int, help="For answers that can be had again.")
@click.option("--thinking/--no-thinking", default=None, help="Whether the model reasons first, where it can choose.")
@server_options
@setting_options(["host", "port", *_FOR_SERVER])
def command(
    name: str | None, adapter: str | None, system: str | None, images: tuple[str, ...], url: str | None,
    api_key: str | None, found: Effective, **sampling: Any,  # noqa: ANN401 # numbers and a flag
) -> int:  # fmt: skip
    """Talk with the model of a running server.

    Without one, or with MODEL, a server is started for the time of the chat. Ctrl-C stops an answer, not the chat.
    """
    thinking = sampling.pop("thinking")
    given = {key: value for key, value in sampling.items() if value is not None}
    if thinking is not None:
        given["enable_thinking"] = thinking
    with _server(name, url, api_key, found) as client:
        model = adapter or health(client)["model"]
        talk = Conversation(client, model, system, given)
        for path in images:
            talk.add_image(path)
        if sys.stdin.isatty():
            click.echo(f"{model} at {client.base_url}; /help for help")
            with suppress(ImportError):
                importlib.import_module("readline")  # from here on input() edits lines and remembers them
        return _loop(talk)


@contextmanager
def _server(name: str | None, url: str | None, api_key: str | None, found: Effective) -> Iterator[httpx.Client]:
    """The server to talk to: the one that runs, or one of our own."""
    wants_own = name is not None or any(found.sources[key] == f"--{key}" for key in ("model", "adapters"))
    if not wants_own or url is not None:
        with connect(found.settings, url, api_key) as client:
            if url is not None or _answers(client):
                yield client
                return
    values = {key.upper(): str(getattr(found.settings, key)) for key in FIELDS if found.sources[key] != DEFAULT}
    for own in ("HOST", "PORT", "RUN_DIR", "ENGINE_ADDRESS", "FEATURES_ADDRESS", "API_KEYS", "API_KEYS_FILE"):
        values.pop(own, None)
    if name is not None:
        values["MODEL"] = name
    click.echo(f"starting a server with {values.get('MODEL', 'the embedded model')} ...", err=True)
    with own_server(values) as client:
        yield client


def _answers(client: httpx.Client) -> bool:
    try:
        health(client)
    except Unavailable:
        return False
    return True


def _loop(talk: Conversation) -> int:
    """Until the end of input; 1 when the last request failed and nobody was there to see it."""
    is_person = sys.stdin.isatty()
    failed = False
    while True:
        try:
            line = input(_PROMPT if is_person else "").strip()
            if line in _QUIT:
                return 0
            failed = bool(line) and not _take(talk, line)
        except EOFError:
            click.echo() if is_person else None
            return 1 if failed and not is_person else 0
        except KeyboardInterrupt:
            if not is_person:
                raise
            click.echo("\n/quit or Ctrl-D ends the chat")


def _take(talk: Conversation, line: str) -> bool:
    """Do what a line says; False, with the reason on standard error, when that failed."""
    try:
        if line.startswith("/"):
            _do(talk, line)
        else:
            _answer(talk, line)
    except TandemError as error:
        click.echo(f"tandem: {error.message}", err=True)
        return False
    return True


def _do(talk: Conversation, line: str) -> None:
    """A line that starts with a slash.

    Raises:
        InvalidRequest: no such command, or an image that cannot be read.
    """
    name, _, rest = line.partition(" ")
    match name:
        case "/help":
            click.echo(HELP)
        case "/clear":
            talk.clear()
            click.echo("cleared")
        case "/system":
            talk.system = rest.strip() or None
        case "/image":
            try:
                paths = shlex.split(rest)
            except ValueError as error:
                raise InvalidRequest(f"/image {rest}: {error}") from error
            for path in paths:
                click.echo(f"{path}: {talk.add_image(path)} bytes, goes with the next message")
            if not paths:
                raise InvalidRequest("/image needs a path")
        case _:
            raise InvalidRequest(f"{name} is no command; /help lists them")


def _answer(talk: Conversation, question: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    shown = ""
    pieces = talk.ask(question)
    try:
        for piece in pieces:
            if piece.timings is not None:
                _end_line(shown)
                click.secho(f"[{summary(piece.timings)}]", dim=True)
                return
            if piece.kind == "text" and shown == "reasoning":
                click.echo("\n")
            shown = piece.kind if piece.text else shown
            text = piece.text.translate(_CONTROLS)
            click.echo(click.style(text, dim=True) if piece.kind == "reasoning" else text, nl=False)
    except KeyboardInterrupt:
        _end_line(shown)
        click.secho("[stopped]", dim=True)
    finally:
        pieces.close()  # ends the request on the server too


def _end_line(shown: str) -> None:
    if shown:
        click.echo()
