"""The effective settings and where each came from: flags, then TANDEM_* variables, then tandem.toml, then defaults.

tandem.toml is looked for in the current folder, then in ~/.config/tandem; the first one found is the only one read. It
holds settings by their names, `max_num_seqs = 4`, without tables.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from shared.config import FIELDS, Settings, Value, check, from_environment, parse, suggestion
from shared.errors import BadConfig
from shared.shipped_drafters import KNOWN

FILE_NAME = "tandem.toml"
DEFAULT = "default"

# Settings that name files. The processes of a server run in another folder than the command that starts them.
_PATHS = frozenset(
    {"run_dir", "cache_dir", "prefix_dir", "curve_keys_file", "responses_file", "api_keys_file", "media_roots"}
)
_MODELS = frozenset({"model", "draft_model"})  # names of models, or files
_WORDS = frozenset({"default", "auto", "ngram", "none", *KNOWN})  # names that mean no file, whatever lies here


class Effective(msgspec.Struct, frozen=True):
    """`sources` has an entry for each setting: "--port", "TANDEM_PORT", "tandem.toml:3" or DEFAULT."""

    settings: Settings
    sources: dict[str, str]
    file: Path | None  # the tandem.toml that was read


def find_file(named: str | None) -> Path | None:
    """The file to read.

    Raises:
        BadConfig: `named` is given and no such file is there.
    """
    if named is not None:
        if not Path(named).expanduser().exists():
            raise BadConfig(f"--config {named}: no such file")
        return Path(named).expanduser()
    places = (Path.cwd() / FILE_NAME, Path.home() / ".config" / "tandem" / FILE_NAME)
    return next((place for place in places if place.is_file()), None)


def effective(
    flags: Mapping[str, Value], named: str | None = None, environ: Mapping[str, str] = os.environ
) -> Effective:
    """Join the layers.

    Args:
        flags: settings by name; a text is parsed.
        named: the file of --config.
    Raises:
        BadConfig: any layer has a setting that does not exist, or a malformed value; those that a higher layer hides
            count too, since a mistake that only shows later is harder to find.
    """
    file = find_file(named)
    here = Path.cwd()
    layers: list[tuple[dict[str, Value], dict[str, str], Path]] = []
    if file is not None:
        values, places = read_file(file)
        layers.append((values, places, file.resolve().parent))
    variables = from_environment(environ)
    layers.append((variables, {name: FIELDS[name].variable for name in variables}, here))
    options = {name: "--" + name.replace("_", "-") for name in flags}
    parsed = {n: parse(FIELDS[n], v, options[n]) if isinstance(v, str) else v for n, v in flags.items()}
    layers.append((parsed, options, here))
    joined: dict[str, Value] = {}
    sources = dict.fromkeys(FIELDS, DEFAULT)
    for values, places, folder in layers:
        joined |= {name: _absolute(name, value, folder) for name, value in values.items()}
        sources |= places
    return Effective(msgspec.convert(joined, Settings), sources, file)


def read_file(file: Path) -> tuple[dict[str, Value], dict[str, str]]:
    """Settings and, for each, its place ("tandem.toml:3").

    Raises:
        BadConfig: the file cannot be read, is no TOML, or has a key or value that is no setting's.
    """
    try:
        text = file.read_bytes().decode()
        content = tomllib.loads(text)
    except OSError as error:
        raise BadConfig(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadConfig(f"{file}: not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(f"{file}: {error}") from error
    values, places = {}, {}
    for key, value in content.items():
        place = _place(file, text, key)
        field = FIELDS.get(key)
        if isinstance(value, dict):
            raise BadConfig(f"{place}: [{key}] is a table; settings stand alone, as `port = 8080`")
        if field is None:
            raise BadConfig(f"{place}: unknown setting {key}{suggestion(key, FIELDS)}")
        is_size = isinstance(value, str) and field.kind is int
        named = f"{place}: {key}"
        values[key] = parse(field, value, named) if is_size else check(field, value, named)
        places[key] = place
    return values, places


def _place(file: Path, text: str, key: str) -> str:
    """File and line of a key; tomllib tells no lines."""
    written = rf"""^\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]"""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(written, line):
            return f"{file}:{number}"
    return str(file)


def _absolute(name: str, value: Value, folder: Path) -> Value:
    """A setting that names files, without depending on the folder that a process runs in."""
    if not isinstance(value, str) or not value:
        return value
    if name == "media_roots":
        return ",".join(str(folder / Path(part.strip()).expanduser()) for part in value.split(",") if part.strip())
    if name in _PATHS or (name == "blas" and "/" in value):
        return str(folder / Path(value).expanduser())
    if name in _MODELS and value not in _WORDS:
        path = folder / Path(value).expanduser()
        is_files = path.is_dir() or path.suffix == ".gguf" or value.startswith((".", "~"))
        return str(path) if is_files else value
    return value
