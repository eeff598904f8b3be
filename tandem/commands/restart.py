"""`tandem restart`: have one process of a running server replaced."""

from __future__ import annotations

import click

from tandem.layers import Effective
from tandem.restart import ROLES, restart
from tandem.setting_options import setting_options


@click.command()
@click.argument("role", type=click.Choice(ROLES))
@setting_options(["port", "run_dir"])
def command(role: str, found: Effective) -> int:
    """Replace one process of the server on --port; its streams pause and go on."""
    supervisor = restart(role, found.settings)
    print(f"{role} restarts (supervisor {supervisor})")
    return 0
