"""`tandem completion`: click's completion script for a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_TANDEM_COMPLETE"  # click's rule: the program's name in capitals


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> int:
    """Print a script that completes commands and options in SHELL.

    For bash, add this line to ~/.bashrc:

        eval "$(tandem completion bash)"
    """
    maker = get_completion_class(shell)
    assert maker is not None, shell
    root = click.get_current_context().find_root().command
    print(maker(root, {}, "tandem", VARIABLE).source())
    return 0
