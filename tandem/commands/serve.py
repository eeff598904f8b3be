"""`tandem serve`: check the settings, fetch the model, then become `tandem.processes`, which starts all processes."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from shared import config
from shared.api_keys import load_keys
from shared.errors import BadConfig
from shared.sockets import check_addresses
from tandem.interrupt import fetch, fetch_drafter
from tandem.layers import Effective
from tandem.ports import check_port
from tandem.setting_options import SettingsCommand, setting_options


@click.command(cls=SettingsCommand)
@setting_options()
def command(found: Effective) -> NoReturn:
    """Start every process and serve HTTP until Ctrl-C.

    Each option is also an environment variable, `--max-queue` is TANDEM_MAX_QUEUE, and a key of tandem.toml, max_queue.
    """
    settings = found.settings
    if settings.trust_remote_code:
        raise BadConfig("--trust-remote-code is not supported: no code is ever run from a model's folder")
    check_port(settings)
    fetch(settings.model, settings)
    if settings.draft_checkpoint:
        fetch_drafter(settings)
    check_addresses(settings)
    load_keys(settings)
    config.prepare_run_folder(settings)
    environment = {
        **os.environ,
        **config.to_environment(settings),
        "PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
    }
    os.execve(sys.executable, [sys.executable, "-m", "tandem.processes"], environment)
