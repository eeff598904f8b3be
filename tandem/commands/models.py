"""`tandem models`: what is on this machine and whether it can be served."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.errors import BadModel
from tandem.layers import Effective
from tandem.model_list import CachedModel, cached, files_of
from tandem.setting_options import setting_options
from tandem.units import size


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@setting_options(["cache_dir"])
def command(as_json: bool, found: Effective) -> int:
    """List the models on this machine: size, type, and whether they can be served.

    MODEL is what `--model` takes. Any other folder, .gguf file or Hugging Face id can be served too.
    """
    models = cached(found.settings)
    rows = [(model, *judge(model)) for model in models]
    if as_json:
        keys = ("model", "place", "path", "bytes", "type", "served")
        click.echo(
            json.dumps(
                [dict(zip(keys, (m.name, m.place, str(m.path), m.num_bytes, *told), strict=True)) for m, *told in rows]
            )
        )
        return 0
    if not rows:
        click.echo("no models yet: `tandem pull` fetches the embedded one, `tandem pull org/name` one of the hub")
        return 0
    table = Table("model", "size", "type", "can be served")
    for model, kind, served in rows:
        table.add_row(escape(model.name), size(model.num_bytes), escape(kind), escape(served))
    Console().print(table)
    return 0


def judge(model: CachedModel) -> tuple[str, str]:
    """Its type, and "yes", "as a drafter (KIND)" or "no: REASON"."""
    from workers.load.servable import examine  # loads MLX, which an empty cache does not need

    try:
        finding = examine(files_of(model))
    except BadModel as error:
        return "unknown", f"no: {error.message}"
    if finding.drafter is not None:
        return finding.architecture, f"as a drafter ({finding.drafter})"
    return finding.architecture, "yes" if finding.refusal is None else f"no: {finding.refusal}"
