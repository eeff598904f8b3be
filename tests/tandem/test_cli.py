"""The frame of the `tandem` command: help, errors, exit codes, completion."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest

from shared.config import FIELDS
from shared.supervise import EXIT_CONFIG
from tandem import cli, ports
from tandem.cli import ALIASES, EXIT_USAGE, main
from tandem.commands import pull
from tests.support.terminal import environment

NAMES = cli.tandem.list_commands(click.Context(cli.tandem))  # type: ignore[attr-defined] # a group


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert {"serve", "chat", "models", "pull", "status", "restart", "race", "bench", "config", "doctor"} <= set(NAMES)
    for name in NAMES:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", [*NAMES, *ALIASES])
def test_each_command_has_a_help_that_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: tandem {name}")
    assert len(shown.splitlines()) >= 4


def test_serve_has_every_setting_as_an_option_under_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--help"])
    shown = capsys.readouterr().out
    for field in FIELDS.values():
        assert f"  --{field.name.replace('_', '-')} " in shown
        assert f"\n{field.group}:\n" in shown


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from tandem.cli import main; main(['--help']); "
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'fastapi', 'zmq', 'tokenizers'}; "
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["srve"], EXIT_USAGE, "'serve'"),
        (["serve", "--max-queu", "1"], EXIT_USAGE, "--max-queue"),
        (["serve", "--port"], EXIT_USAGE, "--port"),
        (["restart", "targt"], EXIT_USAGE, "'target'"),
        (["bench", "serv"], EXIT_USAGE, "serve, drafters, prefix"),
        (["serve", "--port", "many"], EXIT_CONFIG, "--port: 'many' is not a whole number"),
        (["serve", "--log-level", "loud"], EXIT_CONFIG, "--log-level: 'loud' is not one of debug"),
        (["serve", "--trust-remote-code"], EXIT_CONFIG, "not supported"),
        (["serve", "--model", "/no/such"], EXIT_CONFIG, "/no/such"),
        (["serve", "--config", "/no/such.toml"], EXIT_CONFIG, "/no/such.toml"),
        (["status", "--port", "9"], 1, "tandem serve"),
        (["status", "--url", "http://127.0.0.1:9"], 1, "--url"),
        (["restart", "target", "--port", "9"], 1, "no server runs"),
        (["race"], EXIT_USAGE, "--draft-model"),
        (["keys", "/no/such/folder/file"], EXIT_CONFIG, "/no/such/folder/file"),
        (["chat", "--temperature", "-1"], EXIT_USAGE, "--temperature"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments]) == code
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("tandem: ") and errors.count("\n") == 1 and errors.endswith("\n")
    assert said in errors


def test_a_misspelt_variable_is_refused_by_every_command_that_reads_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_MAX_QUEU", "1")
    for name in ("serve", "config", "status", "models", "pull", "doctor", "chat"):
        assert main([name]) == EXIT_CONFIG, name
        assert capsys.readouterr().err == (
            "tandem: unknown setting TANDEM_MAX_QUEU; did you mean TANDEM_MAX_QUEUE?\n"
        )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "not allowed to write")],
)
def test_a_disk_that_takes_no_more_is_told_in_one_line(
    number: int, mend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/cache/models/x")

    monkeypatch.setattr(pull, "fetch", refuse)
    assert main(["pull"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and mend in errors and "/cache/models/x" in errors and "--cache-dir" in errors


def test_an_error_that_is_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(pull, "fetch", fail)
    with pytest.raises(OSError, match="Invalid argument"):
        main(["pull"])


def test_config_tells_values_and_sources_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tandem.toml").write_text('\nmax_queue = 7\nadmin_key = "hidden-admin"\n')
    monkeypatch.setenv("TANDEM_API_KEYS", "hidden-one,hidden-two")
    assert main(["config", "--port", "9000"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split(" = ")[0].strip(): line for line in shown.splitlines()}
    assert lines["port"].split() == ["port", "=", "9000", "#", "--port"]
    assert lines["max_queue"].endswith(f"# {tmp_path}/tandem.toml:2")
    assert lines["api_keys"].endswith("# TANDEM_API_KEYS")
    assert "hidden" not in shown and "host" not in lines
    assert main(["config", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert set(everything) == set(FIELDS)
    assert everything["host"] == {"value": "127.0.0.1", "source": "default"}
    assert everything["admin_key"]["value"] == "***"


def test_completion_knows_commands_options_and_choices(tmp_path: Path) -> None:
    def complete(words: str, number: int) -> list[str]:
        variables = {"_TANDEM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        done = subprocess.run(
            [sys.executable, "-m", "tandem"], env=environment(tmp_path, **variables), capture_output=True, text=True,
            timeout=60, check=True,
        )  # fmt: skip
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("tandem st", 1) == ["status"]
    assert complete("tandem serve --max-num", 2) == ["--max-num-seqs", "--max-num-batched-tokens"]
    assert complete("tandem serve --dtype b", 3) == ["bfloat16"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"_TANDEM_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_a_busy_port_is_told_with_its_holder_and_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    errors = capsys.readouterr().err
    assert f"127.0.0.1:{port} is in use by process {os.getpid()} (" in errors
    assert "--port" in errors and errors.count("\n") == 1


def test_a_busy_port_of_a_process_that_may_not_be_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ports.psutil, "process_iter", list)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        assert main(["serve", "--port", str(held.getsockname()[1])]) == 1
    assert "may not see" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--host", "192.0.2.1"), ("--host", "no host"), ("--port", "70000")])
def test_an_address_that_is_none(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", option, value]) == EXIT_CONFIG
    assert option in capsys.readouterr().err


def test_a_key_file_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "k"]) == 0
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert main(["keys", "k"]) == EXIT_CONFIG
    assert "cannot be made" in capsys.readouterr().err


def test_a_checkout_that_is_not_installed_starts():
    """Started from the checkout's folder with its dependencies on the path, but no package metadata."""
    code = (
        "import importlib.metadata as m, sys\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "from tandem.cli import main\n"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "tandem, version unknown\n"
