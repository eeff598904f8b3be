"""A tiny model in this process, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem import LocalModel, load
from tests.support import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def model(folder: Path) -> Iterator[LocalModel]:
    with load(str(folder), "none", dtype="float32", max_num_seqs=4, blas_threads=1) as loaded:
        yield loaded
