import pytest


@pytest.fixture(scope="session")
def transformers():
    # Models this small gain nothing from threads, and wait for each other's where cores are shared.
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _all_layers_may_share(request, monkeypatch):
    """transformers 5.23 cannot build its own assistant: it looks for a layer that writes keys, and there is none."""
    if "transformers" not in request.fixturenames:
        return
    config = request.getfixturevalue("transformers").Gemma4TextConfig
    own = config.kv_sharing_modes.fget

    def modes(self):
        return ["reuse"] * self.num_hidden_layers if self.num_kv_shared_layers == self.num_hidden_layers else own(self)

    monkeypatch.setattr(config, "kv_sharing_modes", property(modes))
