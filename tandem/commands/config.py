"""`tandem config`: the effective settings and where each came from."""

from __future__ import annotations

import json

import click

from shared.config import FIELDS, Value
from tandem.layers import DEFAULT, Effective
from tandem.setting_options import SettingsCommand, setting_options

SECRETS = frozenset({"api_keys", "admin_key"})


@click.command(cls=SettingsCommand)
@click.option("--all", "is_all", is_flag=True, help="Also settings that have their default.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@setting_options()
def command(is_all: bool, as_json: bool, found: Effective) -> int:
    """Print the settings that `serve` would run with, given the same options, and where each value came from."""
    names = [name for name in FIELDS if is_all or as_json or found.sources[name] != DEFAULT]
    if as_json:
        print(json.dumps({name: {"value": shown(found, name), "source": found.sources[name]} for name in names}))
        return 0
    width = max((len(name) for name in names), default=0)
    for name in names:
        print(f"{name:<{width}} = {_toml(shown(found, name)):<24} # {found.sources[name]}")
    print(f"# tandem.toml: {found.file or 'none'}; {len(FIELDS) - len(names)} settings have their default (--all)")
    return 0


def shown(found: Effective, name: str) -> Value:
    """A value as it may be shown to whoever looks over a shoulder."""
    value: Value = getattr(found.settings, name)
    return "***" if name in SECRETS and value else value


def _toml(value: Value) -> str:
    return json.dumps(value)  # booleans, numbers and short texts are written alike in both
