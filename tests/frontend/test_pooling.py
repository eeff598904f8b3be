"""How an embedding checkpoint's files and the setting decide what /v1/embeddings does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from frontend.embeddings_api import pooling_for
from frontend.pooling import CheckpointPooling, of_folder
from frontend.service import Service
from shared.config import Settings
from shared.errors import BadModel, InvalidRequest

POOLING = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def folder(path: Path, config: Any, *modules: dict[str, Any]) -> Path:
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if modules:
        (path / "modules.json").write_text(json.dumps(modules))
    return path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, CheckpointPooling("last")),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, CheckpointPooling("mean")),
        ({"pooling_mode": "lasttoken"}, CheckpointPooling("last")),
        ({"pooling_mode_cls_token": True}, CheckpointPooling(None, "pooling by cls_token is not supported")),
        (
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True},
            CheckpointPooling(None, "pooling by lasttoken and mean_tokens is not supported"),
        ),
    ],
)
def test_the_pooling_that_a_checkpoint_names(tmp_path: Path, config: Any, expected: CheckpointPooling) -> None:
    assert of_folder(folder(tmp_path, config, POOLING)) == expected


def test_other_folders_pool_nothing_and_other_modules_are_told(tmp_path: Path) -> None:
    assert of_folder(tmp_path) is None
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    found = of_folder(folder(tmp_path, {"pooling_mode": "mean"}, POOLING, dense))
    assert found == CheckpointPooling(None, "its module 'Dense' is not supported")


@pytest.mark.parametrize("config", [["mean"], "x", None])
def test_malformed_files_stop_the_start(tmp_path: Path, config: Any) -> None:
    with pytest.raises(BadModel, match="expected a JSON object"):
        of_folder(folder(tmp_path, config))


def service(setting: str, pooling: CheckpointPooling | None) -> Service:
    settings = Settings(pooling=setting)  # type: ignore[arg-type] # one of the literals
    return cast(Service, SimpleNamespace(settings=settings, model_name="m", text=SimpleNamespace(pooling=pooling)))


def test_the_setting_goes_before_the_checkpoint() -> None:
    assert pooling_for(service("auto", CheckpointPooling("mean"))) == "mean"
    assert pooling_for(service("last", CheckpointPooling("mean"))) == "last"
    assert pooling_for(service("mean", None)) == "mean"
    for setting, pooling, why in (
        ("auto", None, "gives no embeddings"),
        ("none", CheckpointPooling("mean"), "switched off"),
        ("auto", CheckpointPooling(None, "because"), "because"),
    ):
        with pytest.raises(InvalidRequest, match=why) as caught:
            pooling_for(service(setting, pooling))
        assert caught.value.param == "model"
