"""A tiny model and a running server for the system tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_model
from tests.support.server import Server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(model, tmp_path_factory.mktemp("server"), max_num_seqs=16).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def drafting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny vision model that drafts in every step, for tests that look at a server from outside."""
    folder = tiny_model.write_qwen2_vl(tmp_path_factory.mktemp("vision") / "tiny")
    with Server(folder, tmp_path_factory.mktemp("server"), max_num_seqs=4, draft_tokens=4) as running:
        yield running
