"""Shared by all tests: MLX on the CPU computes in float32 without run-time compilation, and nothing uses threads.

Models as small as here gain nothing from threads, and `make test` fills the cores with processes: threads that wait for
each other on busy cores are slow. PyTorch, NumPy and SciPy read the variable when they are loaded.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
