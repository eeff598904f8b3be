import pytest


@pytest.fixture(scope="session")
def transformers():
    # Models this small gain nothing from threads, and wait for each other's where cores are shared.
    pytest.importorskip("torch").set_num_threads(1)
    return pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _assistants_can_be_built(request, monkeypatch):
    """What transformers 5.23 lacks for its assistant.

    Building one looks for a layer that writes keys, and it has none; a target without KV-shared layers keeps none of
    its layers' keys for it, although the comment there says that it does.
    """
    if "transformers" not in request.fixturenames:
        return
    config = request.getfixturevalue("transformers").Gemma4TextConfig
    own = config.kv_sharing_modes.fget

    def modes(self):
        if self.num_kv_shared_layers == self.num_hidden_layers:
            return ["reuse"] * self.num_hidden_layers
        found = own(self)
        if self.num_kv_shared_layers == 0:
            for kind in set(self.layer_types):
                found[max(i for i, k in enumerate(self.layer_types) if k == kind)] = "store"
        return found

    monkeypatch.setattr(config, "kv_sharing_modes", property(modes))
