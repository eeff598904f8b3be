"""Which BLAS the arms get."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import blas, report
from shared.errors import BadConfig
from workers import blas as worker_blas


def test_a_named_library_goes_to_children_with_its_threads(tmp_path: Path) -> None:
    library = tmp_path / "libfast.so"
    library.touch()
    assert blas.find(str(library)) == library
    environment = blas.environment(library, 2)
    assert environment["LD_PRELOAD"] == str(library)
    assert environment["MKL_NUM_THREADS"] == environment["BLIS_NUM_THREADS"] == "2"


def test_off_changes_nothing() -> None:
    assert blas.find("off") is None
    assert blas.environment(None, None) == {}


def test_a_missing_library_is_refused() -> None:
    with pytest.raises(BadConfig, match="no BLAS library"):
        blas.find("/no/such/libblas.so")


def test_a_gpu_needs_no_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_blas, "fastest", lambda: "libfast.so.4")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(report, "gpu", lambda: None)
    assert blas.find("auto") == Path("libfast.so.4")
    monkeypatch.setattr(worker_blas, "fastest", lambda: None)
    assert blas.find("auto") is None
    monkeypatch.setattr(worker_blas, "fastest", lambda: "libfast.so.4")
    monkeypatch.setattr(report, "gpu", lambda: "NVIDIA H100, 580")
    assert blas.find("auto") is None


def test_blis_gets_threads_that_it_does_not_take_by_itself(tmp_path: Path) -> None:
    library = tmp_path / "libblis.so.4"
    library.touch()
    assert int(blas.environment(library, None)["BLIS_NUM_THREADS"]) >= 1
