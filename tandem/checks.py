"""What `tandem doctor` looks at: each check says one thing about the machine, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from shared.config import Settings, to_environment
from shared.errors import BadConfig, Unavailable
from shared.model_files import EMBEDDED_MEMBER
from tandem.connection import connect, health
from tandem.layers import DEFAULT, Effective
from tandem.ports import check_port
from tandem.units import size
from workers.self_test import Report

MIN_FILES = 4096  # connections, sockets and shards of weights at once
MIN_DISK_BYTES = 5 << 30  # a small checkpoint and the prefix cache on SSD
MIN_MEMORY_BYTES = 2 << 30
SELF_TEST_S = 180.0  # about 10 on an idle machine

ROOT = Path(__file__).resolve().parent.parent  # where `-m` finds our packages, as for the Procfile

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """One line of the doctor. `mend` is empty where nothing is to be done."""

    name: str
    level: Level
    text: str
    mend: str = ""


def findings(found: Effective) -> Iterator[Finding]:
    """All checks, the slow one last."""
    settings = found.settings
    yield _machine()
    yield _mlx_package()
    yield _files_limit()
    yield _memory()
    yield _disk("disk", settings.cache_folder)
    yield _port(settings)
    yield from self_test(settings, is_model_named=found.sources["model"] != DEFAULT)


def _machine() -> Finding:
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    text = f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return Finding("machine", "fail", text, "MLX needs a Mac with Apple silicon")
    return Finding("machine", "ok", text)


def _mlx_package() -> Finding:
    """Which backend is installed; whether it works, the self-test tells."""
    names = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    if "mlx" not in names:
        return Finding("MLX", "fail", "not installed", "pip install 'mlx-tandem[cpu]' or [cuda13]")
    backends = [name for name in names if name.startswith(("mlx-cuda", "mlx-cpu", "mlx-metal"))]
    text = f"mlx {names['mlx']}, backend {', '.join(sorted(backends)) or 'built in'}"
    has_gpu = sys.platform == "linux" and shutil.which("nvidia-smi") is not None
    if has_gpu and not any(name.startswith("mlx-cuda") for name in backends):
        return Finding("MLX", "warn", f"{text}, but there is an NVIDIA GPU", "pip install 'mlx[cuda13]'")
    return Finding("MLX", "ok", text)


def _files_limit() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        return Finding("open files", "warn", f"at most {soft}", f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    text = f"{size(memory.available)} free of {size(memory.total)}"
    if memory.available < MIN_MEMORY_BYTES:
        return Finding("memory", "warn", text, "end other programs, or serve a smaller model")
    return Finding("memory", "ok", text)


def _disk(name: str, folder: Path) -> Finding:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    text = f"{size(free)} free at {folder}"
    if not os.access(existing, os.W_OK):
        return Finding(name, "fail", f"{existing} cannot be written", "choose another folder with --cache-dir")
    if free < MIN_DISK_BYTES:
        return Finding(name, "warn", text, "free some space, or choose another folder with --cache-dir")
    return Finding(name, "ok", text)


def _port(settings: Settings) -> Finding:
    try:
        check_port(settings)
    except Unavailable as error:
        if _is_tandem(settings):
            return Finding("port", "ok", f"{settings.port}: a Tandem server runs there")
        held, _, mend = error.message.partition(": ")
        return Finding("port", "fail", held, mend)
    except BadConfig as error:
        return Finding("port", "fail", error.message, "choose others with --host and --port")
    return Finding("port", "ok", f"{settings.host}:{settings.port} is free")


def _is_tandem(settings: Settings) -> bool:
    with connect(settings, None, "") as client:
        try:
            health(client)
        except Unavailable:
            return False
    return True


def self_test(settings: Settings, *, is_model_named: bool) -> Iterator[Finding]:
    """In a process of its own: a fault of a driver or of MLX must not take the doctor along."""
    is_embedded_here = (settings.cache_folder / "models" / Path(EMBEDDED_MEMBER).name).exists()
    is_tiny = not is_model_named and not is_embedded_here
    command = [sys.executable, "-m", "workers.self_test", *(["tiny"] if is_tiny else [])]
    environment = {**os.environ, **to_environment(settings)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SELF_TEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding("self-test", "fail", f"not done in {SELF_TEST_S:.0f} s", "see what else keeps the machine busy")
        return
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}, without a word"]
        yield Finding(
            "self-test", "fail", lines[-1][:300], f"run `{' '.join(command[1:])}` with this Python to see more"
        )
        return
    yield from told(msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=Report))
    if is_tiny:
        yield Finding("model", "ok", "the embedded model is not here yet", "tandem pull")


def told(report: Report) -> Iterator[Finding]:
    """The lines of a self-test that came to its end."""
    speed = f"{report.gflops:.0f} GFLOP/s in float32"
    line = report.blas.removeprefix("BLAS: ").split(";")[0]
    if "reference library" in report.blas:
        yield Finding("BLAS", "warn", f"{line}: {speed}", "pip install mkl, or name a library with --blas")
    else:
        yield Finding("BLAS" if report.device == "cpu" else "device", "ok", f"{report.device}, {line}: {speed}")
    yield Finding("attention", "ok", "; ".join(report.attention) or "stock operations")
    text = (
        f"{report.model} in {report.dtype}: loaded in {report.load_s:.1f} s, {report.num_tokens} tokens at "
        f"{report.tokens_per_s:.1f} tokens/s"
    )
    if report.is_right:
        yield Finding("self-test", "ok", f"{text}, equal to a plain forward")
    else:
        far = "not a number" if report.deficit is None else f"{report.deficit:.3g} below the best"
        mend = "try --attention stock, then another version of MLX, and report it"
        yield Finding("self-test", "fail", f"{text}; WRONG tokens (a logit {far})", mend)
