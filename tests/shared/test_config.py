"""Settings come from the environment; anything misspelt or malformed stops start-up."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shared.config import FIELDS, GROUPS, PREFIX, Settings, load, prepare_run_folder, to_environment
from shared.errors import BadConfig


def test_values_are_read_by_the_type_of_their_setting() -> None:
    environ = {
        "TANDEM_PORT": "9000",
        "TANDEM_NGRAM": "yes",
        "TANDEM_TTFT_BOUND_S": "0.5",
        "TANDEM_MODEL": "7",
        "TANDEM_DTYPE": "bfloat16",
        "HOME": "/",
    }
    settings = load(environ)
    assert (settings.port, settings.ngram, settings.ttft_bound_s) == (9000, True, 0.5)
    assert (settings.model, settings.dtype) == ("7", "bfloat16")


@pytest.mark.parametrize(
    ("environ", "checkpoint", "is_ngram"),
    [
        ({}, "", True),
        ({"TANDEM_DRAFT_MODEL": "auto"}, "", True),
        ({"TANDEM_DRAFT_MODEL": "ngram"}, "", True),
        ({"TANDEM_DRAFT_MODEL": "none"}, "", False),
        ({"TANDEM_DRAFT_MODEL": ""}, "", False),
        ({"TANDEM_DRAFT_MODEL": "none", "TANDEM_NGRAM": "1"}, "", True),
        ({"TANDEM_DRAFT_MODEL": "/some/eagle"}, "/some/eagle", False),
        ({"TANDEM_DRAFT_MODEL": "org/name", "TANDEM_NGRAM": "1"}, "org/name", True),
    ],
)
def test_drafts_come_out_of_text_unless_a_drafter_or_none_is_asked_for(
    environ: dict[str, str], checkpoint: str, is_ngram: bool
) -> None:
    settings = load(environ)
    assert (settings.draft_checkpoint, settings.is_ngram) == (checkpoint, is_ngram)


def test_empty_values_are_as_if_not_set() -> None:
    environ = {PREFIX + f.name.upper(): "" for f in msgspec.structs.fields(Settings) if f.name != "model"}
    changed = {f.name for f in FIELDS.values() if f.kind is str and not f.choices}
    settings = load(environ)
    for field in msgspec.structs.fields(Settings):
        if field.name not in changed:
            assert getattr(settings, field.name) == field.default, field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TANDEM_PROT", "1"),
        ("TANDEM_port", "x"),
        ("TANDEM_PORT", "many"),
        ("TANDEM_PORT", "80.5"),
        ("TANDEM_NGRAM", "perhaps"),
        ("TANDEM_DTYPE", "float8"),
        ("TANDEM_LOG_LEVEL", "loud"),
        ("TANDEM_", "1"),
    ],
)
def test_a_misspelt_or_malformed_variable_stops_start_up_and_is_named(name: str, value: str) -> None:
    with pytest.raises(BadConfig) as raised:
        load({name: value})
    assert name.removeprefix(PREFIX).lower() in raised.value.message.lower()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TANDEM_PROT", "TANDEM_PORT"),
        ("TANDEM_MAX_NUM_SEQ", "TANDEM_MAX_NUM_SEQS"),
        ("TANDEM_LOGLEVEL", "TANDEM_LOG_LEVEL"),
    ],
)
def test_a_misspelt_variable_is_told_the_right_one(name: str, meant: str) -> None:
    with pytest.raises(BadConfig, match=f"unknown setting {name}; did you mean {meant}\\?"):
        load({name: "1"})


def test_a_variable_like_no_setting_gets_no_suggestion() -> None:
    with pytest.raises(BadConfig, match=r"unknown setting TANDEM_XYZZY$"):
        load({"TANDEM_XYZZY": "1"})


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1024", 1024), ("4k", 4096), ("2GiB", 2 << 30), ("512 MB", 512 << 20), ("-1", -1)]
)
def test_sizes_may_have_units(text: str, num_bytes: int) -> None:
    assert load({"TANDEM_PREFIX_HOST_BYTES": text}).prefix_host_bytes == num_bytes


@pytest.mark.parametrize("text", ["4x", "GiB", "1.5.2G", "k"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadConfig, match=r"TANDEM_KV_CACHE_BYTES.*1GiB"):
        load({"TANDEM_KV_CACHE_BYTES": text})


def test_only_sizes_have_units() -> None:
    with pytest.raises(BadConfig, match="TANDEM_PORT: '8k' is not a whole number"):
        load({"TANDEM_PORT": "8k"})


def test_the_environment_made_from_settings_makes_them_again() -> None:
    settings = Settings(model="/m", port=9, ngram=True, prefix_cache=False, ttft_bound_s=0.25, enable_thinking="false")
    assert load(to_environment(settings)) == settings
    assert load(to_environment(Settings())) == Settings()


def test_every_setting_is_described_and_belongs_to_a_group() -> None:
    assert set(GROUPS) <= set(FIELDS)
    for field in FIELDS.values():
        assert len(field.text) > 5 and field.group, field.name


def test_the_run_folder_is_private(tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path / "a" / "run"))
    folder = prepare_run_folder(settings)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert prepare_run_folder(settings).stat().st_mode & 0o777 == 0o700


def test_a_run_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o755)
    (tmp_path / "run").symlink_to(tmp_path / "mine")
    with pytest.raises(BadConfig, match="link"):
        prepare_run_folder(Settings(run_dir=str(tmp_path / "run")))
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o755


def test_two_ports_have_two_run_folders() -> None:
    assert Settings(port=1).run_folder != Settings(port=2).run_folder
