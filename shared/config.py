"""Settings of every process, from the environment (`TANDEM_*`).

One process tree has one environment, so every process reads the same `Settings`. `tandem serve` joins its flags, these
variables and tandem.toml (tandem/layers.py) and hands the outcome to all processes as such variables. A misspelt or
malformed value stops start-up.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec

from shared.errors import BadConfig

PREFIX = "TANDEM_"

Value = bool | int | float | str


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Field `x_y` is the environment variable `TANDEM_X_Y`, the option `--x-y` and the key `x_y` of tandem.toml.

    The text beside each type is what `tandem serve --help` and docs/configuration.md say.
    """

    # what is served
    model: Annotated[str, "the embedded model (`default`), a folder, a .gguf file or a Hugging Face id"] = "default"
    model_name: Annotated[str, "name shown to clients; empty: taken from the model"] = ""
    draft_model: Annotated[
        str,
        "`auto` and `ngram`: out of text, no checkpoint; `none`; a drafter, named as `model` is; or one shipped for "
        "the embedded model: `dflash`, `eagle3`, `mtp`",
    ] = "auto"
    draft_kind: Annotated[str, "kind of the drafter; empty: by its checkpoint"] = ""
    draft_block_size: Annotated[int, "tokens that a block drafter proposes at once; 0: its checkpoint's"] = 0
    draft_max_batch: Annotated[int, "no drafts while more sequences decode; 0: as long as they pay"] = 0
    draft_tokens: Annotated[int, "drafted in every step, whatever it costs (to measure); 0: as many as pay"] = 0
    ngram: Annotated[bool, "propose from the text itself before asking the drafter"] = False
    adapters: Annotated[
        str, "LoRA adapters, `name=folder` or `name=org/repository`, comma separated; a request names one as its model"
    ] = ""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "of weights, activations and caches; `auto`: float32 on a CPU, else the checkpoint's",
    ] = "auto"
    trust_remote_code: Annotated[
        bool, "not supported: no code is ever run from a model's folder; true stops start-up"
    ] = False
    tool_parser: Annotated[str, "how the model writes tool calls; empty: by the chat template; `none`: not at all"] = ""
    reasoning_parser: Annotated[
        str, "how it marks reasoning; empty: by template and vocabulary; `none`: not at all"
    ] = ""
    thinking_start_token: Annotated[str, "text that opens reasoning; empty: the reasoning parser's"] = ""
    thinking_end_token: Annotated[str, "text that closes it; empty: the reasoning parser's"] = ""
    pooling: Annotated[
        Literal["auto", "none", "last", "mean"], "of /v1/embeddings; `auto`: as the checkpoint says, if it does"
    ] = "auto"
    enable_thinking: Annotated[
        Literal["", "true", "false"], "for requests that do not say; empty: the template's own way"
    ] = ""

    # where
    host: Annotated[str, "address to listen on; 0.0.0.0 for all, with API keys"] = "127.0.0.1"
    port: Annotated[int, "TCP port to listen on"] = 8080
    ui: Annotated[bool, "serve the chat page at /ui"] = True
    run_dir: Annotated[str, "folder of the sockets; empty: a private one under the temporary folder, by port"] = ""
    engine_address: Annotated[str, "of the scheduler's socket: ipc:// or tcp://; empty: in the run folder"] = ""
    features_address: Annotated[str, "of the drafter's socket for hidden rows; empty: in the run folder"] = ""
    curve_keys_file: Annotated[str, "needed where one of these can be reached from outside (`tandem keys FILE`)"] = ""
    cache_dir: Annotated[str, "folder for downloads and caches; empty: ~/.cache/tandem"] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], "of every process"] = "info"
    tracing: Annotated[bool, "OpenTelemetry spans of requests; needs the extra `otel`; OTEL_* say where they go"] = (
        False
    )

    # engine
    max_num_seqs: Annotated[int, "slots: sequences that run at once; 0: chosen for the machine"] = 0
    max_num_batched_tokens: Annotated[int, "tokens of one step; 0: chosen for the machine"] = 0
    max_model_len: Annotated[int, "longest sequence in tokens; 0: the model's limit, or what memory allows"] = 0
    kv_cache_bytes: Annotated[int, "memory for keys and values; 0: chosen for the machine"] = 0
    attention: Annotated[Literal["auto", "stock", "kernel"], "`auto`: a kernel where it is right and faster here"] = (
        "auto"
    )
    kv_layout: Annotated[
        Literal["auto", "slots", "paged"],
        "`paged`: prefixes share blocks, nothing is copied; `auto`: where a CUDA kernel attends to them in all layers",
    ] = "auto"
    prefix_cache: Annotated[bool, "compute a prefix that requests share only once"] = True
    prefix_cache_bytes: Annotated[int, "device memory for cached prefixes; 0: a share of the KV memory"] = 0
    prefix_host_bytes: Annotated[
        int, "copies in host memory; -1: chosen where device memory is separate, else none"
    ] = -1
    prefix_ssd_bytes: Annotated[int, "copies on SSD, in the cache folder, that outlive a restart; 0: none"] = 4 << 30
    prefix_dir: Annotated[str, "where these files are; empty: in the cache folder"] = ""
    prefix_check_rate: Annotated[float, "share of hits that an idle target computes again and compares"] = 0.01
    max_queue: Annotated[int, "waiting requests before a 429"] = 256
    memory_limit_bytes: Annotated[int, "of all processes, no new requests beyond; 0: nine tenths of the machine's"] = 0
    memory_hard_limit_bytes: Annotated[
        int, "running sequences are preempted beyond it; 0: 5 % above memory_limit_bytes"
    ] = 0
    priority_ageing_s: Annotated[float, "a request gains one priority level for each such wait"] = 10.0
    ttft_bound_s: Annotated[float, "prefill gets the whole step when a request waits longer; 0: never"] = 0.0

    # stored responses (/v1/responses)
    responses_file: Annotated[str, "SQLite file; empty: in the cache folder, by port"] = ""
    responses_max_num: Annotated[int, "responses kept; those used longest ago are dropped"] = 10_000
    responses_max_bytes: Annotated[int, "of all kept responses"] = 512 * 1024 * 1024
    responses_ttl_s: Annotated[float, "a response is kept so long after its last use"] = 30 * 86400.0

    # liveness
    heartbeat_interval_s: Annotated[float, "between two heartbeats of a process"] = 1.0
    heartbeat_timeout_s: Annotated[float, "a process that is silent for so long counts as gone"] = 10.0
    step_timeout_s: Annotated[float, "of one step, at most; once steps are measured, a large multiple of theirs"] = (
        300.0
    )
    drain_timeout_s: Annotated[float, "after SIGTERM live requests may take so long to finish"] = 20.0
    max_early_deaths: Annotated[
        int, "of one process in a row, each within 20 s of its start, no worker ready before; then all ends"
    ] = 5

    # machine
    blas: Annotated[str, "Linux CPU: `auto`, `off`, or the path of a library to load before MLX"] = "auto"
    blas_threads: Annotated[int, "0: chosen for the machine"] = 0

    # who may call
    api_keys: Annotated[str, "comma separated; empty: no authentication"] = ""
    api_keys_file: Annotated[str, "more of them, one a line with an optional weight"] = ""
    admin_key: Annotated[str, "for what changes the server for everybody; empty: every caller may"] = ""

    # limits of HTTP requests
    max_body_bytes: Annotated[int, "of one request; a 413 beyond it"] = 32 * 1024 * 1024
    max_connections: Annotated[int, "open at once; a 503 beyond it"] = 2048
    max_requests_per_key: Annotated[int, "running at once; 0: no limit"] = 0
    requests_per_minute_per_key: Annotated[int, "0: no limit"] = 0
    body_timeout_s: Annotated[float, "for a request's body to arrive"] = 120.0
    slow_reader_s: Annotated[float, "a client that reads nothing for so long is disconnected"] = 60.0

    # media that requests point to (docs/operations.md)
    allow_media_urls: Annotated[bool, "fetch http and https URLs of public hosts"] = False
    media_hosts: Annotated[str, "names, addresses, networks to fetch from even if private; comma separated"] = ""
    media_roots: Annotated[str, "folders whose files requests may name; comma separated"] = ""
    media_max_bytes: Annotated[int, "of one file"] = 64 * 1024 * 1024
    media_timeout_s: Annotated[float, "of one fetch"] = 20.0

    @property
    def draft_checkpoint(self) -> str:
        """The drafter to load; empty where none is asked for or drafts need no checkpoint."""
        return "" if self.draft_model in ("", "none", "auto", "ngram") else self.draft_model

    @property
    def is_ngram(self) -> bool:
        """Whether drafts come out of text. By default they do: it costs nothing where it does not pay."""
        return self.draft_model in ("auto", "ngram") or self.draft_kind == "ngram" or self.ngram

    @property
    def run_folder(self) -> Path:
        if self.run_dir:
            return Path(self.run_dir)
        return Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}-{self.port}"

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache_dir).expanduser() if self.cache_dir else Path.home() / ".cache" / "tandem"

    @property
    def prefix_folder(self) -> Path:
        return Path(self.prefix_dir).expanduser() if self.prefix_dir else self.cache_folder / "prefix"

    @property
    def engine_endpoint(self) -> str:
        """Where the scheduler's ROUTER listens: every other process connects here."""
        return self.engine_address or f"ipc://{self.run_folder}/engine.sock"

    @property
    def features_endpoint(self) -> str:
        """Where the drafter's PULL listens: the target pushes hidden rows here."""
        return self.features_address or f"ipc://{self.run_folder}/features.sock"


# The heading of each group in `--help` and the documentation, by the group's first setting.
GROUPS = MappingProxyType(
    {
        "model": "What is served",
        "host": "Where",
        "max_num_seqs": "Engine",
        "responses_file": "Stored responses (/v1/responses)",
        "heartbeat_interval_s": "Liveness",
        "blas": "Machine",
        "api_keys": "Who may call",
        "max_body_bytes": "Limits of HTTP requests",
        "allow_media_urls": "Media that requests point to",
    }
)
_BOOLS = MappingProxyType({"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False})
_UNITS = MappingProxyType({"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40})


class Field(msgspec.Struct, frozen=True):
    """One setting. `kind` is bool, int, float or str; `choices` are the words of a Literal."""

    name: str
    kind: type
    choices: tuple[str, ...]
    default: Value
    text: str
    group: str

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(word for word in self.choices if word)
        if self.name.endswith("_bytes"):
            return "a number of bytes, such as 1073741824 or 1GiB"
        return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.kind]


def _fields() -> dict[str, Field]:
    hints = get_type_hints(Settings, include_extras=True)
    found, group = {}, ""
    for known in msgspec.structs.fields(Settings):
        group = GROUPS.get(known.name, group)
        hint, text = get_args(hints[known.name])
        is_choice = get_origin(hint) is Literal
        choices = get_args(hint) if is_choice else ()
        found[known.name] = Field(known.name, str if is_choice else hint, choices, known.default, text, group)
    return found


FIELDS = MappingProxyType(_fields())


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def parse(field: Field, text: str, where: str) -> Value:
    """The value that `text` stands for.

    Args:
        where: what the message calls it, such as "TANDEM_PORT".
    Raises:
        BadConfig: it is no such value.
    """
    value: object = text
    word = text.strip().lower()
    if field.kind is bool:
        value = _BOOLS.get(word, text)
    elif field.kind is int and field.name.endswith("_bytes"):
        unit = word.removesuffix("b").removesuffix("i")
        if unit[-1:] in _UNITS and unit[:-1].strip().isdigit():
            value = int(unit[:-1]) * _UNITS[unit[-1]]
    return check(field, value, where, strict=False)


def check(field: Field, value: object, where: str, *, strict: bool = True) -> Value:
    """`value` as the type of its setting.

    Args:
        strict: False: a text that spells a number will do.
    Raises:
        BadConfig: it is of another type, or none of the choices.
    """
    kind = Literal[field.choices] if field.choices else field.kind
    try:
        checked: Value = msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise BadConfig(f"{where}: {value!r} is not {field.expected}") from error
    return checked


def from_environment(environ: Mapping[str, str]) -> dict[str, Value]:
    """The settings that TANDEM_* variables give. An empty variable is as good as none, except for texts.

    Raises:
        BadConfig: a TANDEM_ variable is unknown or has a value of the wrong type.
    """
    raw = {k[len(PREFIX) :].lower(): v for k, v in environ.items() if k.startswith(PREFIX)}
    for name in sorted(set(raw) - set(FIELDS)):
        variable = PREFIX + name.upper()
        raise BadConfig(f"unknown setting {variable}{suggestion(variable, (f.variable for f in FIELDS.values()))}")
    return {
        name: parse(FIELDS[name], text, FIELDS[name].variable)
        for name, text in raw.items()
        if text or (FIELDS[name].kind is str and not FIELDS[name].choices)
    }


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `environ`.

    Raises:
        BadConfig: a TANDEM_ variable is unknown or has a value of the wrong type.
    """
    return msgspec.convert(from_environment(environ), Settings)


def to_environment(settings: Settings) -> dict[str, str]:
    """The variables from which `load` makes `settings` again, whatever stood there before: all are named."""
    values = {field.variable: getattr(settings, field.name) for field in FIELDS.values()}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


def prepare_run_folder(settings: Settings) -> Path:
    """The run folder, made with mode 0700.

    Raises:
        BadConfig: the folder belongs to someone else.
    """
    folder = settings.run_folder
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.is_symlink() or folder.lstat().st_uid != os.getuid():  # the temporary directory is open to all
        raise BadConfig(f"run folder {folder} belongs to another user, or is a link")
    folder.chmod(0o700)
    return folder
