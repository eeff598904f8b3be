"""A fast BLAS for MLX on Linux without an NVIDIA GPU.

MLX's CPU wheel links the reference BLAS (about 5 GFLOP/s on two cores). A library that is loaded with RTLD_GLOBAL
before `mlx.core` is imported takes its place, since the dynamic linker resolves `cblas_sgemm` in load order: 20-35
times faster float32 products. bfloat16 and float16 never go through BLAS.

Threads must not spin long while they wait: four processes share the cores, and a spinning OpenMP thread takes a core
from the one that has work. But a thread that sleeps between the products of one step is woken late, above all on a
virtual machine, whose idle core has been given away: 100 us bridge the operations in between. Steps of a 135M-parameter
model, 2 cores, oneMKL 2026.2, ms by KMP_BLOCKTIME:

    rows x tokens      1x1    1x8    8x1    8x2    8x4    8x8
    0                   51    107     95    242    284    360
    20us                48     84     93    113    150    215
    100us               48     85     86    105    142    215
    1 (ms)              50     90     90    114    152    216

BLIS multiplies a few rows without packing the weights first, which oneMKL copies at each call. Its builds with OpenMP
keep their threads; those with POSIX threads start them anew for each product. The same model and machine, ms a step:

    rows x tokens              1x1    4x1    8x1   16x1   32x1    1x8    4x4    8x8    prompt of 2,048
    oneMKL 2026.2               53     89    101    126    184     97    132    244               9.2 s
    BLIS 0.9.0, OpenMP          48     52     66     95    137     73     88    205               8.5 s
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from shared.config import Settings
from shared.errors import BadConfig
from workers import cuda

_BLIS = ("libblis.so.4", "libbliso.so.4")  # Debian's name for each of its builds; Fedora's for the one with OpenMP
_OTHERS = ("libblis.so.4", "libopenblas.so.0")

DYNAMIC_TOLERANCE = 1.25  # a second thread makes a large product faster by half at least

_THREAD_VARIABLES = ("MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def prepare(settings: Settings) -> str:
    """Load a BLAS for MLX where that helps, set MLX's switches on CUDA; return a line for the log.

    Call it before anything imports `mlx.core`. Variables that the user has set in the environment are kept.

    Raises:
        BadConfig: `settings.blas` names a library that cannot be loaded.
        RuntimeError: `mlx.core` is already imported, so the library would have no effect.
    """
    if "mlx.core" in sys.modules:
        raise RuntimeError("workers.blas.prepare must run before mlx.core is imported")
    if sys.platform != "linux":
        return "BLAS: the system's own"
    if is_cuda_used():
        cuda.prepare()
        return "BLAS: not used, MLX computes on CUDA"
    # MLX would call g++ at run time for each fused kernel, 0.7 s apiece and no faster on the CPU.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
    if settings.blas == "off":
        return "BLAS: MLX's built-in reference library (slow); TANDEM_BLAS=off"
    num_threads = settings.blas_threads or available_cores()
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, str(num_threads))
    os.environ.setdefault("KMP_BLOCKTIME", "100us")  # Intel OpenMP: how long a thread spins before it sleeps
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # GNU OpenMP: much the same, in turns of a loop
    if settings.blas != "auto":
        path = str(Path(settings.blas).expanduser())
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise BadConfig(f"TANDEM_BLAS: cannot load {path}: {error}") from error
        return f"BLAS: {path}, {num_threads} threads"
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):
            if num_threads > 1 and hasattr(library, "MKL_Set_Dynamic") and "MKL_DYNAMIC" not in os.environ:
                _choose_threads(library)
            return f"BLAS: {candidate}, {num_threads} threads"
    return "BLAS: MLX's built-in reference library (slow); `pip install mkl` makes prompts about 30 times faster"


def fastest() -> str | None:
    """The library that `prepare` would load first, by path or name; None: there is none."""
    return next((name for name in _candidates() if _exists(name)), None)


def _exists(name: str) -> bool:
    try:
        return hasattr(ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL), "cblas_sgemm")
    except OSError:
        return False


def _choose_threads(mkl: ctypes.CDLL) -> None:
    """Let MKL compute small products with one thread, which takes a fifth of the time there, as long as it does not do
    so with large ones too: on some virtual machines it takes all cores for threads of one.
    """
    seconds = []
    for is_dynamic in (0, 1):
        mkl.MKL_Set_Dynamic(is_dynamic)
        seconds.append(min(_product_s(mkl) for _ in range(5)))
    mkl.MKL_Set_Dynamic(int(seconds[1] < DYNAMIC_TOLERANCE * seconds[0]))


def _product_s(library: ctypes.CDLL) -> float:
    """Seconds of one product of 256 rows."""
    row_major, plain = 101, 111
    m, n, k = 256, 512, 512
    a, b, c = ((ctypes.c_float * size)() for size in (m * k, k * n, m * n))
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    started = time.perf_counter()
    library.cblas_sgemm(row_major, plain, plain, m, n, k, one, a, k, b, n, zero, c, n)
    return time.perf_counter() - started


def _candidates() -> Iterator[str]:
    """Fastest first."""
    yield from filter(_is_blis_with_openmp, _BLIS)
    yield from _mkl_libraries()
    yield from _OTHERS


def _is_blis_with_openmp(name: str) -> bool:
    """Whether the system has this library and it was built so. Its symbols do not become the process's by this."""
    try:
        library = ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL)
        return bool(library.bli_info_get_enable_openmp())
    except (OSError, AttributeError):
        return False


def _mkl_libraries() -> Iterator[str]:
    """`libmkl_rt.so.*` of the PyPI package `mkl`, which lies in the environment's lib folder."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name.startswith("libmkl_rt.so"):
            yield os.path.realpath(str(file.locate()))


def is_cuda_used() -> bool:
    """Whether MLX's CUDA backend is installed and finds a device."""
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    if not any(name.startswith("mlx-cuda") for name in names):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def available_cores() -> int:
    """Physical cores that this process may use: affinity and the cgroup's CPU quota bound them."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    return max(1, min(cores, _cgroup_cores()))


def _cgroup_cores() -> int:
    """Cores of the cgroup v2 quota, rounded up; a large number without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if quota == "max" else math.ceil(int(quota) / int(period))
