"""What is installed without a checkout has every file that the code reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NOT_READ = {"shared/drafters/README.md"}
MADE = {"__pycache__"}


def test_files_beside_the_code_are_part_of_the_package() -> None:
    """The CUDA and Metal kernels were not: a wheel would have gone without them, and so by stock operations."""
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, globs in patterns.items()
        for folder in ([REPOSITORY / package.replace(".", "/")] if package != "*" else [])
        for pattern in globs
        for path in folder.glob(pattern)
    }
    found = {
        path
        for package in ("shared", "scheduler", "workers", "frontend", "tandem")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and path.suffix != ".py" and path.name != "py.typed" and not MADE & set(path.parts)
    }
    missing = {str(path.relative_to(REPOSITORY)) for path in found - packed} - NOT_READ
    assert not missing
    assert any(path.suffix == ".cuh" for path in packed)
