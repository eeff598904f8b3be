"""`tandem doctor`: is this machine fit to serve?"""

from __future__ import annotations

import json

import click
import msgspec

from tandem.checks import Finding, findings
from tandem.layers import Effective
from tandem.setting_options import setting_options

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@setting_options(["model", "host", "port", "cache_dir", "attention", "dtype", "blas", "blas_threads"])
def command(as_json: bool, found: Effective) -> int:
    """Check machine, MLX, limits, memory, disk and port, then generate a few tokens in a process of its own.

    The self-test takes about 10 seconds and uses --model, or the embedded model, or a tiny random one. Exit code 1 when
    something failed; a warning alone is 0.
    """
    seen: list[Finding] = []
    for finding in findings(found):
        seen.append(finding)
        if not as_json:
            level = click.style(f"{finding.level:<4}", fg=_COLOURS[finding.level])
            mend = f" -> {finding.mend}" if finding.mend else ""
            click.echo(f"{level}  {finding.name:<10}  {finding.text}{mend}")
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(seen)))
    return 1 if any(finding.level == "fail" for finding in seen) else 0
