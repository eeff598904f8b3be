"""`tandem keys`: a key file for the sockets between machines."""

from __future__ import annotations

from pathlib import Path

import click

from shared.sockets import write_keys


@click.command()
@click.argument("file", type=click.Path())
def command(file: str) -> int:
    """Make a key FILE for processes on several machines (--curve-keys-file)."""
    write_keys(Path(file))
    print(f"{file} made; copy it to every machine of the deployment, mode 0600")
    return 0
