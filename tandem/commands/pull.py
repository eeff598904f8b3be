"""`tandem pull` (and `fetch`): download a model's files and print where they are."""

from __future__ import annotations

from typing import Any

import click

from shared.model_files import resolve
from tandem.setting_options import setting_options, take_settings


@click.command()
@click.argument("model", default="default")
@setting_options(["cache_dir"])
def command(model: str, **options: Any) -> int:  # noqa: ANN401 # click hands over what the options' types made
    """Download MODEL, a Hugging Face id or `default`, the embedded model, and print where its files are."""
    files = resolve(model, take_settings(options).settings)
    print(files.folder or files.gguf)
    return 0
