"""A real BLAS for MLX on Linux without a GPU, the same one for every system under comparison.

The `mlx[cpu]` wheel links the reference BLAS: 5 GFLOP/s in float32 where MKL gives 130 on the same two cores.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from bench import report
from shared.errors import BadConfig
from workers import blas

THREAD_VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def find(choice: str) -> Path | None:
    """The library to load: `choice` is "auto" (the one that Tandem would take, without a GPU), "off" or a path.

    Raises:
        BadConfig: a path that is no file.
    """
    if choice == "off" or (choice == "auto" and (sys.platform != "linux" or report.gpu() is not None)):
        return None
    if choice == "auto":
        name = blas.fastest()
        return None if name is None else Path(name)
    path = Path(choice).expanduser()
    if not path.is_file():
        raise BadConfig(f"no BLAS library at {choice!r}")
    return path


def environment(library: Path | None, threads: int | None) -> dict[str, str]:
    """Variables with which a child process gets `library`."""
    values = {"MLX_DISABLE_COMPILE": "1"} if library is not None else {}
    if library is not None:
        values["LD_PRELOAD"] = str(library)
        values["BLIS_NUM_THREADS"] = str(blas.available_cores())  # it would take one
    if threads is not None:
        values |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    return values


def preload(library: Path | None, threads: int | None) -> None:
    """Loads `library` into this process; its symbols then win over the wheel's, if MLX is imported afterwards."""
    assert "mlx.core" not in sys.modules, "BLAS must be loaded before MLX"
    if library is None:
        return
    os.environ.setdefault("BLIS_NUM_THREADS", str(blas.available_cores()))
    if threads is not None:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # it would call g++ at run time, for no gain on a CPU
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
