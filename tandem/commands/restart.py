"""`tandem restart`: have one process of a running server replaced."""

from __future__ import annotations

from typing import Any

import click

from tandem.restart import ROLES, restart
from tandem.setting_options import setting_options, take_settings


@click.command()
@click.argument("role", type=click.Choice(ROLES))
@setting_options(["port", "run_dir"])
def command(role: str, **options: Any) -> int:  # noqa: ANN401 # click hands over what the options' types made
    """Replace one process of the server on --port; its streams pause and go on."""
    supervisor = restart(role, take_settings(options).settings)
    print(f"{role} restarts (supervisor {supervisor})")
    return 0
