"""The `tandem` command: its sub-commands, help, errors and exit codes.

Built on click: its options are objects, so those of `serve` can be made from `shared.config.Settings`. typer reads
options off function signatures, which would repeat every setting.

A command is a module with a click command named `command`, whose function returns the exit code (None is 0). Modules
are imported when their command runs: `tandem --help` and shell completion load no tokenizer and no MLX. What goes wrong
is said in one line on standard error:

    exit code 0    done
              1    what was asked for could not be done: no server, a failed request, a full disk
              2    the command line is wrong
              78   a setting or a model is wrong (EX_CONFIG; supervisors do not try again)
              130  Ctrl-C
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import MappingProxyType

import click
from click.exceptions import NoArgsIsHelpError, NoSuchCommand

from shared.errors import BadConfig, BadModel, TandemError
from shared.supervise import EXIT_CONFIG
from tandem.interrupt import EXIT_INTERRUPTED

EXIT_USAGE = 2

# Heading -> command -> (module, what it does).
COMMANDS = MappingProxyType(
    {
        "Use a model": {
            "serve": ("tandem.commands.serve", "Start every process and serve HTTP."),
            "chat": ("tandem.commands.chat", "Talk with a model in the terminal."),
            "generate": ("tandem.generate_command", "Answer one prompt, without a server."),
        },
        "Models": {
            "models": ("tandem.commands.models", "List the models on this machine and which can be served."),
            "pull": ("tandem.commands.pull", "Download a model."),
            "convert": ("tandem.convert_command", "Convert and quantise a model."),
            "split-mtp": ("tandem.commands.split_mtp", "Write a model's MTP head as a drafter."),
        },
        "A running server": {
            "status": ("tandem.commands.status", "Show processes, slots, throughput, acceptance and cache hits."),
            "restart": ("tandem.commands.restart", "Replace one process; streams go on."),
        },
        "Measure": {
            "race": ("tandem.commands.race", "Play prompts with and without a drafter."),
            "bench": ("tandem.commands.bench", "Run a benchmark."),
        },
        "Set up": {
            "config": ("tandem.commands.config", "Print the effective settings and where each came from."),
            "doctor": ("tandem.commands.doctor", "Check the machine and generate a few tokens."),
            "keys": ("tandem.commands.keys", "Make a key file for processes on several machines."),
            "completion": ("tandem.commands.completion", "Print a script that completes commands in your shell."),
        },
    }
)
# Names that users of Ollama and of earlier versions know.
ALIASES = MappingProxyType({"fetch": "pull", "run": "chat", "list": "models", "ps": "status"})
_MODULES = {name: module for commands in COMMANDS.values() for name, (module, _) in commands.items()}


class Commands(click.Group):
    """The table above. A command whose module is not installed is not there."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(_MODULES[name]).command
        command.name = name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand as error:
            names = [*self.list_commands(ctx), *ALIASES]
            raise NoSuchCommand(args[0], possibilities=names, ctx=ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        known = self.list_commands(ctx)
        width = max(map(len, known))
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                rows = [(name.ljust(width), text) for name, (_, text) in commands.items() if name in known]
                formatter.write_dl(rows)


def version() -> str:
    """The installed version; "unknown" in a checkout that is only on the path."""
    try:
        return importlib.metadata.version("mlx-tandem")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Settings come from options, then TANDEM_* variables, then tandem.toml: see `tandem config`.",
)
@click.version_option(version(), prog_name="tandem")
def tandem() -> None:
    """Inference server for MLX."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        code = tandem.main(argv, prog_name="tandem", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return EXIT_USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "tandem"
        return _fail(f"{error.format_message()} See `{path} --help`.", EXIT_USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (BadConfig, BadModel) as error:
        return _fail(error.message, EXIT_CONFIG)
    except TandemError as error:
        return _fail(error.message, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush does not fail too
        return 1
    except OSError as error:
        return _fail(_disk_error(error), 1)


def _fail(message: str, code: int) -> int:
    print(f"tandem: {message}", file=sys.stderr)
    return code


def _disk_error(error: OSError) -> str:
    """One line for what a user can mend; anything else is a bug and keeps its traceback."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full{where}: free some space, or choose another folder with --cache-dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write{where}: choose another folder with --cache-dir"
    raise error
