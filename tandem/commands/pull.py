"""`tandem pull` (and `fetch`): download a model's files and print where they are."""

from __future__ import annotations

import click

from tandem.interrupt import fetch
from tandem.layers import Effective
from tandem.setting_options import setting_options


@click.command()
@click.argument("model", default="default")
@setting_options(["cache_dir"])
def command(model: str, found: Effective) -> int:
    """Download MODEL, a Hugging Face id or `default`, the embedded model, and print where its files are."""
    files = fetch(model, found.settings)
    print(files.folder or files.gguf)
    return 0
