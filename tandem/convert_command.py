"""`tandem convert`: the options of tandem/convert.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tandem.convert import check_upload, convert, upload

MODES = ["affine", "mxfp4", "mxfp8", "nvfp4"]
RECIPES = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]  # mlx-lm's
DTYPES = ["float32", "bfloat16", "float16"]


@click.command()
@click.argument("model", required=False)
@click.argument("output", required=False, type=click.Path())
@click.option("--hf-path", "--model", "named_model", metavar="MODEL", help="The same as MODEL.")
@click.option("--mlx-path", "--output", "-o", "named_output", metavar="OUTPUT", help="The same as OUTPUT.")
@click.option("--quantize", "-q", is_flag=True, help="Pack the weights: 4 bits where nothing else is said.")
@click.option("--mode", "--q-mode", type=click.Choice(MODES), help="How they are packed; default: affine.")
@click.option("--bits", "--q-bits", type=int, help="Of each weight: 2, 3, 4, 5, 6 or 8 in mode affine.")
@click.option("--group-size", "--q-group-size", type=int, help="Weights that share a scale: 32, 64 or 128.")
@click.option("--recipe", "--quant-predicate", type=click.Choice(RECIPES), help="More bits for some layers.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of what is not packed; default: as it is.")
@click.option("--dequantize", "-d", is_flag=True, help="Unpack a packed model.")
@click.option("--upload", "--upload-repo", "repository", metavar="OWNER/NAME", help="Send it to the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="With --upload: only for the owner.")
def command(
    model: str | None,
    output: str | None,
    named_model: str | None,
    named_output: str | None,
    quantize: bool,
    repository: str | None,
    private: bool,
    **options: Any,  # noqa: ANN401 - click hands over what the options' types made
) -> int:
    """Write MODEL, a folder or a Hugging Face id, to the folder OUTPUT as MLX reads it.

    Encoders of vision and audio are copied as they are.

    \b
        tandem convert org/model model-4bit --bits 4
        tandem convert org/model model-mxfp4 --mode mxfp4
        tandem convert org/model model-mixed --recipe mixed_3_6
        tandem convert model-4bit model-plain --dequantize --dtype bfloat16
    """
    source = _one(model, named_model, "MODEL")
    target = Path(_one(output, named_output, "OUTPUT")).expanduser()
    if private and repository is None:
        raise click.UsageError("--private needs --upload.")
    if repository is not None:
        check_upload(repository)  # before the work
    if quantize and options["mode"] is None:
        options["mode"] = "affine"
    done = convert(source, target, on_progress=_progress, **options)
    if done.is_text_only:
        print(f"{source} also takes other media; its definition in mlx-lm has text only, and so has {target}")
    if done.num_encoder_tensors:
        print(f"{done.num_encoder_tensors} tensors of encoders are as they were")
    print(f"{target}: {done.num_bytes / 1e9:.2f} GB, {done.bits_per_weight:.2f} bits per weight")
    if repository is not None:
        print(upload(target, repository, private=private))
    return 0


def _one(given: str | None, named: str | None, name: str) -> str:
    if (given is None) == (named is None):
        raise click.UsageError(f"Give {name}." if given is None else f"{name} is given twice.")
    return given if given is not None else str(named)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rwritten {done / 1e9:.2f} of {total / 1e9:.2f} GB", end=end, file=sys.stderr, flush=True)
