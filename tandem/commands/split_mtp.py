"""`tandem split-mtp`: a model's MTP head as a drafter."""

from __future__ import annotations

from pathlib import Path

import click

from tandem.convert import split_mtp


@click.command()
@click.argument("model")
@click.argument("output", required=False, type=click.Path())
def command(model: str, output: str | None) -> int:
    """Write the MTP head of MODEL, a folder or a Hugging Face id, to the folder OUTPUT.

    The model need not be the one that is served, but must have its weights: serve a conversion that lost the head with
    the head of its original. Without OUTPUT: MODEL's last name with -mtp, in this folder.

    \b
        tandem split-mtp org/model
        tandem serve --model org/model-4bit --draft-model ./model-mtp
    """
    target = Path(output) if output is not None else Path(Path(model).expanduser().resolve().name + "-mtp")
    num_bytes = split_mtp(model, target)
    print(f"{target}: {num_bytes / 1e6:.1f} MB")
    return 0
