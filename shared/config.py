"""Settings of every process, from the environment (`TANDEM_*`). The command line sets the same variables.

One process tree has one environment, so every process reads the same `Settings`. A misspelt or malformed variable stops
start-up.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from shared.errors import BadConfig

PREFIX = "TANDEM_"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Field `x_y` is the environment variable `TANDEM_X_Y`."""

    # what is served
    model: str = "default"  # "default" (embedded), a folder, a .gguf file or a Hugging Face id
    model_name: str = ""  # name shown to clients; empty: taken from the model
    draft_model: str = "auto"  # "auto", "ngram": out of text, no checkpoint; "none"; or a drafter, as `model` is named
    # or by the name of one that is shipped for the embedded model: "dflash", "eagle3", "mtp"
    draft_kind: str = ""
    draft_block_size: int = 0
    draft_max_batch: int = 0  # no drafts while more sequences decode; 0: as long as they pay
    draft_tokens: int = 0  # 0: as many as pay; otherwise so many in every step, whatever it costs (to measure)
    ngram: bool = False  # propose from the text itself before asking the drafter
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    tool_parser: str = ""  # how the model writes tool calls; empty: by the chat template; "none": not at all
    reasoning_parser: str = ""  # how it marks reasoning; empty: by template and vocabulary; "none": not at all
    thinking_start_token: str = ""  # text that opens reasoning; empty: the reasoning parser's
    thinking_end_token: str = ""  # text that closes it; empty: the reasoning parser's
    enable_thinking: Literal["", "true", "false"] = ""  # for requests that do not say; empty: the template's own way

    # where
    host: str = "127.0.0.1"
    port: int = 8080
    run_dir: str = ""  # sockets; empty: a private folder under the temporary directory, by port
    engine_address: str = ""  # of the scheduler's socket: ipc:// or tcp://; empty: in the run folder
    features_address: str = ""  # of the drafter's socket for hidden rows; empty: in the run folder
    curve_keys_file: str = ""  # needed where one of these can be reached from outside (tandem keys FILE)
    cache_dir: str = ""  # downloads and caches; empty: ~/.cache/tandem
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # engine
    max_num_seqs: int = 0  # slots; 0: chosen by the worker for its machine
    max_num_batched_tokens: int = 0  # tokens of one step; 0: chosen by the worker for its machine
    max_model_len: int = 0  # 0: the model's own limit, or what memory allows
    kv_cache_bytes: int = 0  # 0: chosen by the worker for its machine
    attention: Literal["auto", "stock", "kernel"] = "auto"  # auto: a kernel where it is right and faster here
    prefix_cache: bool = True
    prefix_cache_bytes: int = 0  # device memory for cached prefixes; 0: a share of the KV memory
    prefix_host_bytes: int = -1  # copies in host memory; -1: chosen where device memory is separate, else none
    prefix_ssd_bytes: int = 4 << 30  # copies on SSD, in the cache folder, that outlive a restart; 0: none
    prefix_dir: str = ""  # where these files are; empty: in the cache folder
    prefix_check_rate: float = 0.01  # share of hits that an idle target computes again and compares
    max_queue: int = 256  # waiting requests before 429
    memory_limit_bytes: int = 0  # of all processes together; no new requests beyond it; 0: nine tenths of the machine's
    memory_hard_limit_bytes: int = 0  # beyond it running sequences are preempted; 0: 5 % above memory_limit_bytes
    priority_ageing_s: float = 10.0  # a request gains one priority level for each such wait
    ttft_bound_s: float = 0.0  # 0: none; otherwise prefill gets the whole step when a request waits longer

    # stored responses (/v1/responses)
    responses_file: str = ""  # SQLite; empty: in the cache folder, by port
    responses_max_num: int = 10_000  # those used longest ago are dropped
    responses_max_bytes: int = 512 * 1024 * 1024
    responses_ttl_s: float = 30 * 86400.0  # after the last use

    # liveness
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 10.0
    step_timeout_s: float = 300.0  # at most; once steps are measured, a large multiple of what they take
    drain_timeout_s: float = 20.0  # after SIGTERM live requests may take so long to finish
    max_early_deaths: int = 5  # of one process in a row, each within 20 s of its start; then the server gives up

    # machine
    blas: str = "auto"  # Linux CPU: "auto", "off", or the path of a library to load before MLX
    blas_threads: int = 0  # 0: chosen for the machine
    api_keys: str = ""  # comma separated; empty: no authentication
    api_keys_file: str = ""  # more of them, one a line with an optional weight
    admin_key: str = ""  # for what changes the server for everybody; empty: every caller may

    # limits of HTTP requests
    max_body_bytes: int = 32 * 1024 * 1024
    max_connections: int = 2048
    max_requests_per_key: int = 0  # running at once; 0: no limit
    requests_per_minute_per_key: int = 0  # 0: no limit
    body_timeout_s: float = 120.0  # for a request's body to arrive
    slow_reader_s: float = 60.0  # a client that reads nothing for so long is disconnected

    # media that requests point to (docs/operations.md)
    allow_media_urls: bool = False  # fetch http and https URLs of public hosts
    media_hosts: str = ""  # names, addresses and networks that may be fetched from even if private; comma separated
    media_roots: str = ""  # folders whose files requests may name; comma separated
    media_max_bytes: int = 64 * 1024 * 1024
    media_timeout_s: float = 20.0

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


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `environ`.

    Raises:
        BadConfig: a TANDEM_ variable is unknown or has a value of the wrong type.
    """
    raw = {k[len(PREFIX) :].lower(): v for k, v in environ.items() if k.startswith(PREFIX)}
    unknown = sorted(set(raw) - {f.name for f in msgspec.structs.fields(Settings)})
    if unknown:
        raise BadConfig("unknown setting " + ", ".join(PREFIX + name.upper() for name in unknown))
    types = {f.name: f.type for f in msgspec.structs.fields(Settings)}
    values: dict[str, object] = {}
    for name, text in raw.items():
        value: object = text
        if text == "" and types[name] is not str:
            continue
        if types[name] is bool:
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            value = words.get(text.strip().lower(), text)
        values[name] = value
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise BadConfig(str(error)) from error


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
