import pytest


@pytest.fixture(scope="session")
def transformers():
    # Models this small gain nothing from threads, and wait for each other's where cores are shared.
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")
