"""Every command line of the documentation: its options, targets and paths are there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import click
import pytest

from shared.config import Settings
from shared.errors import TandemError
from tandem import cli
from tests.frontend.conftest import RunningServer, byte_text
from tests.support.documented import PAGES, Shown, lines, split
from tests.support.server import REPOSITORY

CONTEXT = click.Context(cli.tandem)
MAKEFILE = (REPOSITORY / "Makefile").read_text()
# Programs of others, and what a shell does itself.
FOREIGN = frozenset({"git", "cd", "export", "claude", "prometheus"})
SHOWN = [shown for page in PAGES for shown in lines(page)]


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Path -> methods of the server."""
    folder = str(tmp_path_factory.mktemp("run"))
    server = RunningServer(Settings(run_dir=folder, cache_dir=folder), byte_text())
    try:
        page = server.http.get("/openapi.json").json()
        yield {path: set(methods) for path, methods in page["paths"].items()}
    finally:
        server.close()


def test_there_are_command_lines_of_every_kind() -> None:
    assert len(SHOWN) > 80
    assert {"tandem", "make", "python", "curl"} <= {shown.words[0] for shown in SHOWN}


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_a_documented_line_is_understood(shown: Shown, routes: dict[str, set[str]]) -> None:
    check(shown.words, routes)


@pytest.mark.parametrize(
    "line",
    [
        "tandem server", "tandem serve --modell x", "tandem status --port many", "tandem bench serve --urll x",
        "python -m bench.scheduler --rows 4", "python -m bench.none", "make tests", "make run DRAFTER=mtp",
        "curl http://127.0.0.1:8080/v1/chat/complete -d '{}'", "curl -X POST localhost:8080/v1/models/load -d '{'",
        "tandme serve",
    ],
)  # fmt: skip
def test_a_line_with_a_mistake_is_found(line: str, routes: dict[str, set[str]]) -> None:
    with pytest.raises((AssertionError, click.ClickException, ImportError, ValueError, TandemError)):
        check(split(line), routes)


def check(words: tuple[str, ...], routes: dict[str, set[str]]) -> None:
    """Raises AssertionError, or click's own error: the line would be refused."""
    match words:
        case ("tandem", option) if option.startswith("-"):
            assert option in ("--help", "--version")
        case ("tandem", "COMMAND", *_):
            pass
        case ("tandem", name, *arguments):
            command = cli.tandem.get_command(CONTEXT, name)  # type: ignore[attr-defined] # a group
            assert command is not None, f"no command {name}"
            arguments = [a for a in arguments if a != "--help"]
            if name == "bench" and arguments:
                check_options(f"bench.{arguments[0]}", arguments[1:])
            else:
                command.make_context(name, arguments, resilient_parsing=len(words) == 2)
        case ("python", "-m", module, *arguments) if module.startswith("bench."):
            check_options(module, arguments)
        case ("python", "-m", module, *_):
            assert importlib.util.find_spec(module) is not None, f"no module {module}"
        case ("make", *arguments):
            for argument in arguments:
                name, is_variable, _ = argument.partition("=")
                pattern = rf"\$\({name}\)|^{name} \?=" if is_variable else rf"^\.PHONY:.* {name}( |$)"
                assert re.search(pattern, MAKEFILE, re.MULTILINE), f"the Makefile knows no {argument}"
        case ("curl", *arguments):
            check_request(arguments, routes)
        case (program, *_):
            assert program in FOREIGN, f"unknown program {program}"


def check_options(module: str, arguments: list[str]) -> None:
    """Of one of our scripts, by what its help lists."""
    main: Callable[[list[str]], int] = importlib.import_module(module).main
    stage = [a for a in arguments[:1] if module == "bench.train_drafter"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        main([*stage, "--help"])
    assert ended.value.code == 0
    options = {a.partition("=")[0] for a in arguments if a.startswith("--")}
    assert options <= set(re.findall(r"--[a-z][a-z0-9-]*", said.getvalue())), f"{module} has no {options}"


def check_request(arguments: list[str], routes: dict[str, set[str]]) -> None:
    """A request to a path and with a method that the server has, its body JSON."""
    url = next(a for a in arguments if re.match(r"(http://)?(localhost|127\.0\.0\.1)", a))
    method = arguments[arguments.index("-X") + 1] if "-X" in arguments else "POST" if "-d" in arguments else "GET"
    path = urlsplit(url if "//" in url else f"http://{url}").path
    assert method.lower() in routes.get(path, ())
    if "-d" in arguments:
        json.loads(arguments[arguments.index("-d") + 1])
