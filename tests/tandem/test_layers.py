"""The layers of settings: which wins, where each value came from, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import FIELDS, load, to_environment
from shared.errors import BadConfig
from tandem.layers import DEFAULT, effective


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder and a home of the test's own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_flags_win_over_variables_over_the_file_over_defaults() -> None:
    Path("tandem.toml").write_text('port = 1\nmax_queue = 2\n# a comment\nlog_level = "debug"\n')
    found = effective({"port": "3"}, environ={"TANDEM_PORT": "4", "TANDEM_MAX_QUEUE": "5"})
    assert (found.settings.port, found.settings.max_queue, found.settings.log_level) == (3, 5, "debug")
    assert found.sources["port"] == "--port"
    assert found.sources["max_queue"] == "TANDEM_MAX_QUEUE"
    assert found.sources["log_level"] == f"{Path.cwd()}/tandem.toml:4"
    assert found.sources["host"] == DEFAULT
    assert set(found.sources) == set(FIELDS)


def test_the_file_of_the_current_folder_hides_that_of_the_home_and_config_names_another() -> None:
    folder = Path.home() / ".config" / "tandem"
    folder.mkdir(parents=True)
    (folder / "tandem.toml").write_text("port = 1\n")
    assert effective({}, environ={}).settings.port == 1
    Path("tandem.toml").write_text("max_queue = 2\n")
    found = effective({}, environ={})
    assert (found.settings.port, found.settings.max_queue) == (8080, 2)
    Path("other.toml").write_text("port = 3\n")
    assert effective({}, "other.toml", environ={}).settings.port == 3


def test_every_process_reads_from_the_environment_what_the_layers_gave() -> None:
    Path("tandem.toml").write_text('kv_cache_bytes = "2GiB"\nprefix_cache = false\nttft_bound_s = 1\n')
    settings = effective({"ngram": True}, environ={"TANDEM_MODEL": "org/name"}).settings
    inherited = {"TANDEM_PORT": "99", "TANDEM_MODEL": "another"}
    assert load(inherited | to_environment(settings)) == settings
    assert (settings.kv_cache_bytes, settings.prefix_cache, settings.ttft_bound_s) == (2 << 30, False, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 1\nmax_num_seq = 4\n", r"tandem\.toml:2: unknown setting max_num_seq; did you mean max_num_seqs\?"),
        ("max-queue = 4\n", r"tandem\.toml:1: unknown setting max-queue; did you mean max_queue\?"),
        ("xyzzy = 4\n", r"tandem\.toml:1: unknown setting xyzzy$"),
        ('port = "many"\n', r"tandem\.toml:1: port: 'many' is not a whole number"),
        ('\nngram = "yes"\n', r"tandem\.toml:2: ngram: 'yes' is not true or false"),
        ('dtype = "float8"\n', r"tandem\.toml:1: dtype: 'float8' is not one of auto, float32"),
        ("model = 7\n", r"tandem\.toml:1: model: 7 is not text"),
        ("[engine]\nmax_num_seqs = 4\n", r"tandem\.toml:1: \[engine\] is a table"),
        ("port = \n", r"tandem\.toml: .*line 1"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(text: str, message: str) -> None:
    Path("tandem.toml").write_text(text)
    with pytest.raises(BadConfig, match=message):
        effective({}, environ={})


def test_a_mistake_counts_even_where_a_flag_hides_it() -> None:
    Path("tandem.toml").write_text('port = "many"\n')
    with pytest.raises(BadConfig, match="whole number"):
        effective({"port": 1}, environ={})


def test_a_named_file_must_be_there() -> None:
    with pytest.raises(BadConfig, match=r"--config no\.toml: no such file"):
        effective({}, "no.toml", environ={})


def test_files_are_named_absolutely_since_the_processes_run_elsewhere() -> None:
    Path("models/tiny").mkdir(parents=True)
    Path("conf").mkdir()
    Path("conf/t.toml").write_text('api_keys_file = "keys"\nmedia_roots = "a, /b"\n')
    here = Path.cwd()
    flags = {"model": "models/tiny", "run_dir": "~/run", "draft_model": "org/name", "blas": "./lib.so"}
    settings = effective(flags, "conf/t.toml", environ={"TANDEM_CACHE_DIR": "cache"}).settings
    assert settings.model == f"{here}/models/tiny"
    assert settings.run_dir == f"{Path.home()}/run"
    assert settings.draft_model == "org/name"
    assert settings.blas == f"{here}/lib.so"
    assert settings.cache_dir == f"{here}/cache"
    assert settings.api_keys_file == f"{here}/conf/keys"
    assert settings.media_roots == f"{here}/conf/a,/b"


def test_what_is_no_file_stays_as_it_is() -> None:
    settings = effective({"model": "org/name", "blas": "off"}, environ={}).settings
    assert (settings.model, settings.blas, settings.run_dir) == ("org/name", "off", "")


@pytest.mark.parametrize(("name", "word"), [("model", "default"), ("draft_model", "none"), ("draft_model", "dflash")])
def test_a_word_is_not_taken_for_a_folder_of_that_name(name: str, word: str) -> None:
    Path(word).mkdir()
    assert getattr(effective({name: word}, environ={}).settings, name) == word
