"""Every CUDA kernel compiles as MLX would compile it. Needs NVIDIA's compiler and headers as Python packages:
`pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl` (65 MB); skipped without them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from workers.kernels import delta, gate
from workers.kernels.cuda import append_joined_kernel, append_kernel, attend_kernel, constants_text, header

nvidia = pytest.importorskip("nvidia", reason="no NVIDIA packages")
ROOTS = [Path(folder) for folder in getattr(nvidia, "__path__", [])]
LIBRARIES = [path for root in ROOTS for path in sorted(root.glob("*/lib/libnvrtc.so.*"))]
INCLUDES = [p.parent for root in ROOTS for p in root.glob("*/include/cuda_fp16.h")]
INCLUDES += [p.parent.parent for root in ROOTS for p in root.glob("*/include/**/cuda/__cccl_config")]

pytestmark = pytest.mark.skipif(not LIBRARIES or len(INCLUDES) < 2, reason="no NVRTC with headers")

# What MLX puts before a kernel: the parts of mlx/backend/cuda/device/utils.cuh that the kernels use.
PRELUDE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cooperative_groups.h>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
OTHERS = {
    "gated_delta": (delta.INPUTS, ["y", "after"], delta.BODY),
    "silu_gate": (gate.INPUTS, gate.OUTPUTS, gate.BODY),
}
BF16, FP16, FP32 = "__nv_bfloat16", "__half", "float"
NOT_T = {
    "table": "int", "starts": "int", "params": "int", "old": "int", "inv_freq": "float", "sinks": "float",
    "scratch": "float", "g": "float", "state": "float", "is_real": "bool", "after": "float",
}  # fmt: skip


def parts_of(kernel: str) -> tuple[list[str], list[str], str]:
    """Inputs, outputs and body; an attending kernel's name tells of norms."""
    if kernel in OTHERS:
        return OTHERS[kernel]
    if kernel.startswith("append_joined"):
        return append_joined_kernel(has_norms=kernel.endswith("_normed"))
    if kernel.startswith("append"):
        return append_kernel(gives_back=kernel == "append_after")
    return attend_kernel(kernel.removesuffix("_normed"), has_norms=kernel.endswith("_normed"))


def whole_source(kernel: str, dtype: str, template: dict[str, int]) -> tuple[str, str]:
    """The text MLX generates around a body, and the function's name, which holds the template's values."""
    inputs, outputs, body = parts_of(kernel)
    name = "_".join(["custom_kernel_tandem", kernel, *(str(v) for v in template.values())])
    arguments = []
    for each in inputs:
        arguments.append(f"const {NOT_T.get(each, dtype)}* {each}")
        for kind, suffix in (("Shape", "_shape"), ("Strides", "_strides")):
            if each + suffix in body:
                arguments.append(f"const __grid_constant__ {kind} {each}{suffix}")
    for each in outputs:
        arguments.append(f"{NOT_T.get(each, dtype)}* {each}")
    constants = f"{constants_text(dtype, template)}using TG = float; using TB = {dtype};\n"
    signature = f"__global__ void {name}({', '.join(arguments)})"
    function = f"{signature} {{\n{constants}{body}\n}}"
    return f"{PRELUDE}{header()}{delta.header()}{gate.header()}namespace mlx::core::cu {{\n{function}\n}}\n", name


def compile_log(text: str, name: str) -> str:
    """Empty when NVRTC takes it for an H100, else what it says."""
    library = ctypes.CDLL(str(LIBRARIES[-1]))
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    assert library.nvrtcAddNameExpression(program, f"mlx::core::cu::{name}".encode()) == 0
    options = [b"--device-as-default-execution-space", b"--gpu-architecture=sm_90a", b"-std=c++17"]
    options += [f"--include-path={folder}".encode() for folder in INCLUDES]
    if library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)) == 0:
        return ""
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode()


@pytest.mark.parametrize(
    ("kernel", "dtype", "template"),
    [
        ("attend", BF16, {"D": 64, "G": 3, "MT": 1, "NEW": 16, "ROPE": 64, "SHIFT": 0, "NW": 4}),
        ("attend", FP32, {"D": 256, "G": 2, "MT": 1, "NEW": 8, "ROPE": 0, "SHIFT": 5, "NW": 4}),
        ("attend", FP16, {"D": 80, "G": 4, "MT": 2, "NEW": 16, "ROPE": 80, "SHIFT": 5, "NW": 4}),
        ("attend_written", BF16, {"D": 256, "G": 4, "MT": 1, "NEW": 1, "ROPE": 256, "SHIFT": 0, "NW": 4}),
        ("attend_written", FP32, {"D": 128, "G": 2, "MT": 1, "NEW": 1, "ROPE": 0, "SHIFT": 5, "NW": 4}),
        ("attend_written", BF16, {"D": 256, "G": 4, "MT": 1, "NEW": 1, "ROPE": 0, "SHIFT": 5, "NW": 4}),
        ("attend_written", FP16, {"D": 64, "G": 8, "MT": 2, "NEW": 1, "ROPE": 64, "SHIFT": 0, "NW": 4}),
        ("attend_joined", BF16, {"D": 128, "G": 4, "MT": 1, "NEW": 16, "ROPE": 128, "SHIFT": 0, "NW": 4}),
        ("attend_joined_normed", FP32, {"D": 96, "G": 2, "MT": 1, "NEW": 8, "ROPE": 48, "SHIFT": 5, "NW": 4}),
        ("attend_joined_normed", BF16, {"D": 128, "G": 4, "MT": 2, "NEW": 16, "ROPE": 128, "SHIFT": 0, "NW": 4}),
        ("append", BF16, {"D": 128, "SHIFT": 0}),
        ("append_joined", BF16, {"D": 128, "G": 4, "ROPE": 128, "SHIFT": 0, "NW": 4}),
        ("append_joined_normed", FP16, {"D": 80, "G": 3, "ROPE": 40, "SHIFT": 5, "NW": 4}),
        ("append_after", FP32, {"D": 64, "SHIFT": 5}),
        ("gated_delta", BF16, {"DK": 128, "ROWS": 2, "VECTOR": 0, "MASKED": 0}),
        ("gated_delta", FP16, {"DK": 192, "ROWS": 2, "VECTOR": 0, "MASKED": 1}),
        ("gated_delta", FP32, {"DK": 16, "ROWS": 2, "VECTOR": 1, "MASKED": 1}),
        ("silu_gate", BF16, {}),
        ("silu_gate", FP16, {}),
    ],
)
def test_nvrtc_compiles(kernel: str, dtype: str, template: dict[str, int]) -> None:
    assert compile_log(*whole_source(kernel, dtype, template)) == ""
