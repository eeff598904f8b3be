"""`tandem convert` and `tandem.convert.convert`: a checkpoint in the form that MLX reads, packed or plain.

    from tandem.convert import convert

    convert("org/model", "model-4bit", mode="affine", bits=4)

docs/convert.md has the table of modes.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared import config, model_files
from shared.errors import BadConfig, BadModel, Unavailable

if TYPE_CHECKING:
    from workers.convert import Converted

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
Dtype = Literal["float32", "bfloat16", "float16"]
MLX_WRITES = "[write] "  # how MLX begins the error of a write that failed; it tells no more
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
CARD = """---
library_name: mlx
pipeline_tag: text-generation
{base}tags:
- mlx
---

# {name}

{what}, converted by Tandem{source}.

    tandem generate --model {name} "Hello"
"""


def convert(
    model: str,
    output: str | Path,
    *,
    mode: Mode | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    recipe: str | None = None,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Convert a checkpoint of safetensors.

    Args:
        model: a folder or a Hugging Face id.
        output: a folder that does not exist yet, or is empty. It appears when it is complete, and not before.
        mode: how the matrices are packed; "affine" where only bits, a group size or a recipe are given; None: not.
        bits: affine: 2, 3, 4, 5, 6 or 8; the other modes have their own.
        group_size: affine: 32, 64 or 128 weights for each scale.
        recipe: affine with more bits for some layers: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.
        dtype: of what is not packed; None: as it is.
        dequantize: a packed checkpoint becomes a plain one.
        on_progress: called with (bytes written, bytes in all).
    Raises:
        BadConfig: the options contradict each other or the source, or the output cannot be written.
        BadModel: the source cannot be found, read or converted.
    """
    from workers.convert import Quantization
    from workers.convert import convert as write

    is_packed = mode is not None or bits is not None or group_size is not None or recipe is not None
    if is_packed and dequantize:
        raise BadConfig("dequantize: it contradicts mode, bits, group_size and recipe")
    how = Quantization(mode=mode or "affine", bits=bits, group_size=group_size, recipe=recipe) if is_packed else None
    target = _free_place(Path(output).expanduser())
    files = model_files.resolve(model, config.load())
    if files.folder is None:
        raise BadModel(f"{model}: a GGUF file is served as it is; convert takes folders of safetensors")
    with _appearing(target) as place:
        done = write(files.folder, place, how, dtype=dtype, dequantize=dequantize, on_shard=on_progress)
        what = "Packed weights" if is_packed else "Plain weights" if dequantize else "Weights"
        (place / "README.md").write_text(_card(target.name, model, f"{what} of {done.bits_per_weight:.2f} bits"))
    return done


def split_mtp(model: str, output: str | Path) -> int:
    """Write a checkpoint's MTP head, its `mtp.*` tensors, as a drafter; the bytes of its weights.

    Args:
        model: a folder or a Hugging Face id.
        output: a folder that does not exist yet, or is empty. It appears when it is complete, and not before.
    Raises:
        BadConfig: the output cannot be written.
        BadModel: the source cannot be found or read, has no head, or one that is not supported.
    """
    from workers.convert import split_mtp as write

    target = _free_place(Path(output).expanduser())
    files = model_files.resolve(model, config.load())
    if files.folder is None:
        raise BadModel(f"{model}: a GGUF file; an MTP head is split from folders of safetensors")
    with _appearing(target) as place:
        return write(files.folder, place)


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` at the end. Raises BadConfig: the disk refuses."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            place = Path(folder) / target.name
            place.mkdir()
            yield place
            if target.exists():
                target.rmdir()
            place.replace(target)
    except OSError as error:
        raise BadConfig(f"{target} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:
        if not str(error).startswith(MLX_WRITES):
            raise
        raise BadConfig(f"{target} cannot be written: the disk is full, free some space") from error


def _free_place(target: Path) -> Path:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadConfig(f"{target} exists: name a folder that does not, or is empty")
    return target.absolute()


def _card(name: str, model: str, what: str) -> str:
    is_hub = not Path(model).expanduser().exists()
    base = f"base_model: {model}\n" if is_hub else ""
    return CARD.format(
        name=name, base=base, what=what, source=f" from [{model}](https://huggingface.co/{model})" if is_hub else ""
    )


def check_upload(repository: str) -> None:
    """Before the work: whether an upload can be tried at all.

    Raises:
        BadConfig: the name is malformed, there is no token, or the hub is switched off.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not _REPOSITORY.fullmatch(repository):
        raise BadConfig(f"upload: {repository!r} is not a repository like 'owner/name'")
    if HF_HUB_OFFLINE:
        raise BadConfig("upload: HF_HUB_OFFLINE forbids it")
    if get_token() is None:
        raise BadConfig("upload: there is no Hugging Face token; `hf auth login` stores one, HF_TOKEN names one")


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Send a converted model to the hub. Returns its address.

    Raises:
        Unavailable: the hub refused it, or cannot be reached. The folder is left as it is.
    """
    from huggingface_hub import HfApi

    check_upload(repository)
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=private)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted by Tandem")
    except Exception as error:  # the hub's library lets through what the HTTP library beneath it raises
        raise Unavailable(f"upload to {repository} failed, {folder} is complete: {error}") from error
    return f"https://huggingface.co/{repository}"
