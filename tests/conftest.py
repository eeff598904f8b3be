"""Shared by all tests: MLX on the CPU computes in float32 without run-time compilation, on a real BLAS."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
