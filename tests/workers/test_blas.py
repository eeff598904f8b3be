"""The preloaded BLAS, in a fresh interpreter each: a library cannot be unloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers import blas

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or blas.is_cuda_used(), reason="BLAS is preloaded on Linux without a GPU only"
)

REPORT = """
import json, os, sys
from shared.config import load
from shared.errors import BadConfig
from workers import blas
if {is_mlx_first}:
    import mlx.core
try:
    text = blas.prepare(load())
except (BadConfig, RuntimeError) as error:
    text = f"{{type(error).__name__}}: {{error}}"
maps = open("/proc/self/maps").read()
names = sorted({{line.split("/")[-1] for line in maps.splitlines() if ".so" in line}})
kept = {{k: v for k, v in os.environ.items() if k.startswith(("MKL_", "BLIS_", "OPENBLAS_", "KMP_", "GOMP_", "MLX_"))}}
print(json.dumps([text, names, kept]))
"""


def report(is_mlx_first=False, **environ):
    """(log line or error, names of loaded libraries, variables) of a process that preloads under `environ`."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TANDEM_", "MKL_", "KMP_", "GOMP_", "MLX_", "BLIS_", "OPENBLAS_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(is_mlx_first=is_mlx_first)],
        env={**clean, **environ}, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_blis_goes_first_where_it_has_openmp(monkeypatch):
    monkeypatch.setattr(blas, "_mkl_libraries", lambda: iter(["/env/lib/libmkl_rt.so.3"]))
    monkeypatch.setattr(blas, "_is_blis_with_openmp", lambda name: name == "libbliso.so.4")
    assert list(blas._candidates())[:2] == ["libbliso.so.4", "/env/lib/libmkl_rt.so.3"]
    monkeypatch.setattr(blas, "_is_blis_with_openmp", lambda name: False)
    assert next(iter(blas._candidates())) == "/env/lib/libmkl_rt.so.3"


def test_what_is_no_blis_with_openmp_is_told():
    assert not blas._is_blis_with_openmp("libno-such-thing.so.4")
    assert not blas._is_blis_with_openmp("libm.so.6")


def test_auto_loads_a_library_whose_threads_spin_briefly_and_turns_compilation_off():
    text, names, variables = report()
    if "built-in" in text:
        pytest.skip("no BLAS on this machine")
    library = text.removeprefix("BLAS: ").split(",")[0]
    assert Path(library).name in names or any(name.startswith(Path(library).name) for name in names)
    assert variables["MLX_DISABLE_COMPILE"] == "1"
    assert variables["KMP_BLOCKTIME"] == "100us"
    assert variables["GOMP_SPINCOUNT"] == "20000"
    assert int(variables["MKL_NUM_THREADS"]) >= 1


def test_off_loads_nothing():
    text, names, variables = report(TANDEM_BLAS="off")
    assert "TANDEM_BLAS=off" in text
    assert not any("mkl" in name or "blis" in name or "openblas" in name for name in names)
    assert "MKL_NUM_THREADS" not in variables


def test_thread_count_is_taken_from_the_setting_and_the_users_variables_win():
    _, _, variables = report(TANDEM_BLAS_THREADS="3", OPENBLAS_NUM_THREADS="7")
    assert variables["MKL_NUM_THREADS"] == "3"
    assert variables["OPENBLAS_NUM_THREADS"] == "7"


def test_a_path_that_cannot_be_loaded_is_named():
    text, _, _ = report(TANDEM_BLAS="/no/such/libblas.so")
    assert text.startswith("BadConfig: TANDEM_BLAS")
    assert "/no/such/libblas.so" in text


def test_too_late_is_an_error():
    text, _, _ = report(is_mlx_first=True)
    assert text.startswith("RuntimeError")
