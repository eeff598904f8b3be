"""`tandem models`: what is found, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.model_files import ModelFiles
from tandem.cli import main
from tests.support import tiny_model
from workers.load.servable import Finding, examine

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


def test_models_tells_which_can_be_served_and_why_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["models", "--cache-dir", str(tmp_path)]) == 0
    assert "tandem pull" in capsys.readouterr().out
    own = tmp_path / "models"
    own.mkdir()
    (own / "good").symlink_to(model)
    tiny_model.write_eagle3(own / "eagle", model)
    (own / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    snapshot = tmp_path / "hub" / "models--org--bert" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    (snapshot / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert main(["models", "--json", "--cache-dir", str(tmp_path)]) == 0
    told = {Path(line["model"]).name: line for line in json.loads(capsys.readouterr().out)}
    assert (told["good"]["served"], told["good"]["type"], told["good"]["place"]) == ("yes", "llama", "tandem")
    assert told["good"]["bytes"] > 100_000
    assert told["eagle"]["served"] == "as a drafter (eagle3)"
    assert told["bad.gguf"]["served"].startswith("no: ") and "GGUF" in told["bad.gguf"]["served"]
    bert = told["bert"]
    assert (bert["model"], bert["place"], bert["type"]) == ("org/bert", "hub", "bert")
    assert bert["served"].startswith("no: unknown model_type 'bert'")
    assert main(["list", "--cache-dir", str(tmp_path)]) == 0
    assert "org/bert" in capsys.readouterr().out


def test_what_loading_would_refuse_is_refused(model: Path, tmp_path: Path) -> None:
    def with_config(name: str, **changes: object) -> ModelFiles:
        folder = tmp_path / name
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((model / "config.json").read_text()) | changes
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        return ModelFiles(name=name, folder=folder)

    assert examine(with_config("good")) == Finding("llama")
    code = examine(with_config("code", model_file="mine.py"))
    assert code.refusal is not None and "own code" in code.refusal
    activation = examine(with_config("activation", hidden_act="gelu"))
    assert activation.refusal is not None and "hidden_act 'gelu'" in activation.refusal
    chunked = examine(with_config("chunked", model_type="phi3small"))
    assert chunked.refusal is not None

    cut = with_config("cut")
    assert cut.folder is not None
    weights = cut.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-4])
    finding = examine(cut)
    assert finding.refusal is not None and "model.safetensors is cut short" in finding.refusal
    weights.unlink()
    finding = examine(cut)
    assert finding.refusal is not None and "no model*.safetensors" in finding.refusal
    whole = with_config("no-tokenizer")
    assert whole.folder is not None
    (whole.folder / "tokenizer.json").unlink()
    assert examine(whole).refusal is not None
