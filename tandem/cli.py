"""The `tandem` command line: `serve`, `fetch`, `restart`, `keys` and `race`.

Every option of `serve` sets the environment variable of the same name (`--max-queue` is TANDEM_MAX_QUEUE), which all
processes read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shared import config
from shared.api_keys import load_keys
from shared.errors import BadConfig, BadModel, Unavailable
from shared.model_files import resolve
from shared.shipped_drafters import resolve_drafter
from shared.sockets import check_addresses, write_keys
from shared.supervise import EXIT_CONFIG
from tandem import race
from tandem.restart import ROLES, restart


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tandem", description="Inference server for MLX.")
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="start every process and serve HTTP")
    for setting in msgspec.structs.fields(config.Settings):
        default = setting.default if setting.default != "" else "none"
        serve.add_argument(f"--{setting.name.replace('_', '-')}", metavar="VALUE", help=f"default: {default}")
    fetch = commands.add_parser("fetch", help="download a model's files and print where they are")
    fetch.add_argument("model", nargs="?", default="default")
    again = commands.add_parser("restart", help="replace one process of a running server; streams go on")
    again.add_argument("role", choices=ROLES)
    again.add_argument("--port", help="of the server; default: TANDEM_PORT")
    keys = commands.add_parser("keys", help="make a key file for processes on several machines")
    keys.add_argument("file")
    run = commands.add_parser("race", help="play prompts with and without a drafter; parity, acceptance, speed")
    run.add_argument("--draft-model", required=True, help="as for serve: a checkpoint, or ngram")
    run.add_argument("--model", default="default")
    run.add_argument("--prompts", metavar="FILE", help="one prompt on each line; default: eight of our own")
    run.add_argument("--max-tokens", type=int, default=128, help="of each answer")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command == "fetch":
            files = resolve(options["model"], config.load())
            print(files.folder or files.gguf)
            return 0
        if command == "keys":
            write_keys(Path(options["file"]))
            return 0
        if command == "restart":
            if options["port"] is not None:
                os.environ[config.PREFIX + "PORT"] = options["port"]
            print(f"{options['role']} restarts (supervisor {restart(options['role'], config.load())})")
            return 0
        if command == "race":
            return race.main(options)
        return serve(options)
    except Unavailable as error:
        print(f"tandem: {error}", file=sys.stderr)
        return 1
    except (BadConfig, BadModel) as error:
        print(f"tandem: {error}", file=sys.stderr)
        return EXIT_CONFIG


def serve(options: dict[str, str | None]) -> int:
    """Check the settings, fetch the model, then become `tandem.processes`: a small process that starts all others.

    Raises:
        BadConfig, BadModel: nothing was started.
    """
    for name, value in options.items():
        if value is not None:
            os.environ[config.PREFIX + name.upper()] = value
    settings = config.load()
    resolve(settings.model, settings)
    if settings.draft_checkpoint:
        resolve_drafter(settings)
    check_addresses(settings)
    load_keys(settings)
    config.prepare_run_folder(settings)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "tandem.processes"], environment)
