"""The choice of a model: what it changes of the settings, and going back to the one before."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shared import served
from shared.config import Settings
from shared.errors import BadConfig, BadModel
from shared.served import Choice, Served
from shared.supervise import EXIT_CONFIG, LAST_EXIT


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As processes read them: from their environment."""
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("TANDEM_MODEL", "first")
    monkeypatch.setenv("TANDEM_MODEL_NAME", "ours")
    monkeypatch.delenv(LAST_EXIT, raising=False)
    return served.load()[0]


def changed(settings: Settings, model: str) -> Served:
    before = served.read(settings)
    choice = msgspec.structs.replace(Choice.of(settings), model=model)
    after = Served(load_id=before.load_id + 1, choice=choice, previous=before.choice)
    served.write(settings, after)
    return after


def test_without_a_file_the_settings_stand(settings: Settings) -> None:
    assert (settings.model, settings.model_name) == ("first", "ours")


def test_another_model_has_its_own_name(settings: Settings) -> None:
    changed(settings, "second")
    now, _ = served.load()
    assert (now.model, now.model_name) == ("second", "")
    assert msgspec.structs.replace(now, model="first", model_name="ours") == settings


def test_the_first_to_fail_goes_back_and_a_second_one_follows(settings: Settings) -> None:
    wanted = changed(settings, "second")
    assert served.go_back("target", settings, wanted, "too large")
    now = served.read(settings)
    assert (now.choice.model, now.error, now.failed_role, now.previous) == ("first", "too large", "target", None)
    assert now.load_id == wanted.load_id + 1
    assert served.go_back("drafter", settings, wanted, "other words")
    assert served.read(settings) == now


def test_a_model_that_served_before_is_not_given_up(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    only = served.read(settings)
    assert served.refused("target", settings, only, BadModel("no such file")) == EXIT_CONFIG
    assert "target: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("last_exit", "model"), [("", "second"), ("0", "second"), ("-9", "first"), ("1", "first")])
def test_a_worker_that_died_of_the_new_model_takes_the_old_one(
    last_exit: str, model: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(settings, "second")
    monkeypatch.setenv(LAST_EXIT, last_exit)
    assert served.load_for("target")[0].model == model


def test_a_death_after_the_model_has_proven_itself_changes_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.write(settings, msgspec.structs.replace(changed(settings, "second"), previous=None))
    monkeypatch.setenv(LAST_EXIT, "-9")
    assert served.load_for("target")[0].model == "second"


def test_a_damaged_file_is_told(settings: Settings) -> None:
    served.path(settings).write_bytes(b"{")
    with pytest.raises(BadConfig, match=r"served\.json"):
        served.load()
