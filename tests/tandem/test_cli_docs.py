"""The documentation of the command: what it shows runs, and every setting and command is in it."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from shared.config import FIELDS
from tandem import cli
from tandem.cli import ALIASES, main
from tandem.config_page import page
from tandem.layers import effective
from tests.support import documented
from tests.support.server import REPOSITORY

DOCS = REPOSITORY / "docs"
CLI = (DOCS / "cli.md").read_text()
CONTEXT = click.Context(cli.tandem)
NAMES = cli.tandem.list_commands(CONTEXT)  # type: ignore[attr-defined] # a group

# What needs no server, no network and no second model.
OFFLINE = frozenset({"bench", "config", "keys", "completion", "models"})
SHOWN = [shown.words for shown in documented.lines(DOCS / "cli.md") if shown.in_block]


def test_every_command_has_a_section_with_an_example() -> None:
    shown = {words[1] for words in SHOWN}
    ours = [name for name in NAMES if cli._MODULES[name].startswith("tandem.commands.")]
    for name in ours:
        assert f"\n## {name}\n" in CLI
        assert name in shown
    for alias in ALIASES:
        assert f"`{alias}`" in CLI


@pytest.mark.parametrize("words", [w for w in SHOWN if w[1] in OFFLINE and len(w) < 5], ids=" ".join)
def test_documented_commands_run(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(list(words[1:])) == 0
    output, errors = capsys.readouterr()
    assert output and not errors


def test_the_page_of_settings_is_the_one_that_is_made() -> None:
    text = (DOCS / "configuration.md").read_text()
    for field in FIELDS.values():
        assert f"`{field.variable}`" in text, f"{field.name}: python -m tandem.config_page > docs/configuration.md"
    assert text == page()


def test_the_example_file_of_the_page_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    example = re.search(r"```toml\n(.*?)```", page(), re.DOTALL)
    assert example is not None
    (tmp_path / "t.toml").write_text(example[1])
    settings = effective({}, str(tmp_path / "t.toml"), environ={}).settings
    assert (settings.kv_cache_bytes, settings.prefix_cache) == (4 << 30, False)
    assert settings.api_keys_file == f"{tmp_path}/keys"
