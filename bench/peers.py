"""The same seeded loads against Tandem and the servers of mlx-lm and mlx-vlm, one server at a time, on one machine.

Every arm serves the same float32 weights, with the same BLAS, over loopback HTTP. Each load gets a fresh server, so
that no cache is warm before it; warm-up requests use other texts. `python -m bench.peers --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec
import psutil
from tqdm import tqdm

from bench import blas, peer_model, report
from bench.ceiling import concurrencies
from bench.load import Played, Record, Target, play, summarize
from bench.workloads import SEED_STRIDE, LocalCounter, Shape, build, parse_range
from shared.config import Settings, load

READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 15.0
POLL_S = 0.2
KINDS = ("uniform", "shared", "mixed")
TANDEM_COMMAND = ("{python}", "-m", "honcho", "start", "-f", "Procfile")


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One server. `{python}`, `{folder}`, `{port}` in command and environment are filled in."""

    name: str
    command: tuple[str, ...]
    package: str | None = None  # PyPI name; its server runs in a virtual environment of its own
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    model: str = "{folder}"  # what requests name


ARMS = (
    Arm(
        name="tandem",
        command=TANDEM_COMMAND,
        # The SSD tier of its prefix cache would survive a restart, so each server gets a new folder.
        environment={
            "PYTHON": "{python}",
            "TANDEM_PORT": "{port}",
            "TANDEM_MODEL": "{folder}",
            "TANDEM_PREFIX_DIR": "{scratch}",
        },
        model="default",
    ),
    Arm(
        name="mlx-lm",
        command=("{python}", "-m", "mlx_lm", "server", "--model", "{folder}", "--port", "{port}"),
        package="mlx-lm",
    ),
    Arm(
        name="mlx-vlm",
        command=("{python}", "-m", "mlx_vlm.server", "--model", "{folder}", "--port", "{port}"),
        package="mlx-vlm",
    ),
    Arm(
        name="mlx-vlm+APC",
        command=("{python}", "-m", "mlx_vlm.server", "--model", "{folder}", "--port", "{port}"),
        package="mlx-vlm",
        # Its disk tier would survive a restart, so each server gets a new folder.
        environment={"APC_ENABLED": "1", "MLX_VLM_CACHE_HOME": "{scratch}"},
    ),
)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One load at one concurrency; every arm gets the same texts."""

    kind: str
    concurrency: int
    shape: Shape
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind} c={self.concurrency}"


def make_loads(args: argparse.Namespace) -> list[Load]:
    """uniform, shared (cold: the first `concurrency` requests arrive together at an empty cache), mixed."""
    loads = []
    for kind in args.loads:
        for concurrency in args.concurrency:
            shape = Shape(
                num_requests=max(args.min_requests, args.requests_per_slot * concurrency),
                prompt_tokens=args.prompt_tokens,
                output_tokens=args.output_tokens,
            )
            if kind == "shared":
                num_requests = max(args.min_requests, concurrency)
                shape = msgspec.structs.replace(shape, num_requests=num_requests, shared_prefix=args.shared_prefix)
            elif kind == "mixed":
                shape = msgspec.structs.replace(shape, mixed=args.mixed)
            loads.append(Load(kind=kind, concurrency=concurrency, shape=shape, seed=args.seed + KINDS.index(kind)))
    return loads


def python_of(arm: Arm, settings: Settings) -> Path:
    """The interpreter that runs an arm; makes a peer's virtual environment with its newest release where missing.

    Raises:
        subprocess.CalledProcessError: pip or venv failed; its own message is on standard error.
    """
    if arm.package is None:
        return Path(sys.executable)
    folder = settings.cache_folder / "peers" / arm.package
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"Installing {arm.package} into {folder} ...", file=sys.stderr)
        backend = ["mlx"] if sys.platform == "darwin" else ["mlx[cuda13]"] if report.gpu() else ["mlx[cpu]"]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "--upgrade"]
        subprocess.run([*install, *backend, arm.package], check=True, stdout=sys.stderr)
        done.touch()
    return python


def version_of(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}), m.version('mlx'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    version, mlx = done.stdout.split()
    return f"{version} (mlx {mlx})"


@contextmanager
def serving(arm: Arm, python: Path, folder: Path, extra: Mapping[str, str], log: IO[bytes]) -> Iterator[Target]:
    """A running, ready server; stopped by its own process id on the way out.

    Raises:
        RuntimeError: it ended or was not ready in time; the log file says why.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        values = {"python": str(python), "folder": str(folder), "port": str(port), "scratch": scratch}
        environment = os.environ | {k: v.format(**values) for k, v in arm.environment.items()} | dict(extra)
        command = [part.format(**values) for part in arm.command]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=report.REPOSITORY if arm.package is None else scratch,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            target = Target(url=f"http://127.0.0.1:{port}", model=arm.model.format(**values))
            _wait_ready(process, target)
            yield target
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], target: Target) -> None:
    """Polls /health, then asks for one token: a server may listen before its model is loaded."""
    deadline = time.monotonic() + READY_DEADLINE_S
    with httpx.Client(base_url=target.url, trust_env=False, timeout=5.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode} before it was ready")
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(POLL_S)
        else:
            raise RuntimeError(f"the server was not ready within {READY_DEADLINE_S:.0f} s")
        body = {"model": target.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        answer = client.post("/v1/chat/completions", json=body, timeout=max(1.0, deadline - time.monotonic()))
        if answer.status_code != 200:
            raise RuntimeError(f"the server's first answer was {answer.status_code}: {answer.text[:300]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process we started; SIGKILL to the group it leads when it does not end in time."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_DEADLINE_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _resident_bytes(url: str) -> int | None:
    """Resident memory of the process that listens at `url` and of its relatives; None where it cannot be seen."""
    port = int(url.rpartition(":")[2])
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid:
                group = os.getpgid(connection.pid)
                members = [p for p in psutil.process_iter() if _group(p.pid) == group]
                return sum(p.memory_info().rss for p in members)
    except psutil.Error:
        pass
    return None


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def play_load(load_: Load, target: Target, folder: Path, repeat: int) -> tuple[dict[str, Any], Played]:
    """A short warm-up with other texts, then the load."""
    count = LocalCounter(str(folder))
    warm_shape = Shape(num_requests=2, prompt_tokens=24, output_tokens=4)
    asyncio.run(play(target, build(warm_shape, load_.seed + SEED_STRIDE, count), 2))
    prompts = build(load_.shape, load_.seed + repeat * SEED_STRIDE * 2, count)
    with tqdm(total=len(prompts), unit="req", desc=load_.name, file=sys.stderr, disable=None, leave=False) as bar:

        def on_end(record: Record) -> None:
            bar.update(1)

        played = asyncio.run(play(target, prompts, load_.concurrency, on_end))
    return summarize(played, load_.concurrency) | {"resident_bytes": _resident_bytes(target.url)}, played


def markdown(results: Sequence[Mapping[str, Any]], head: Mapping[str, Any]) -> str:
    """One table for each load, arms in rows."""
    machine = head["machine"]
    lines = [
        f"# Peers, {head['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, GPU {machine['gpu'] or 'none'}; BLAS {head['blas'] or 'none'}, "
        f"threads {head['blas_threads'] or 'default'}; {head['model']}; commit {head['commit']}.",
        f"`{head['command']}`",
        "",
        *(f"- {name}: {version}" for name, version in head["arms"].items()),
    ]
    header = ["server", "output tok/s", "TTFT p50", "TTFT p90", "ITL p50", "ITL p99", "TPOT p50", "e2e p50"]
    header += ["cached / prompt", "errors", "finish", "same text"]
    for name in dict.fromkeys(r["load"] for r in results):
        rows = []
        for r in results:
            if r["load"] != name:
                continue
            if "failed" in r:
                rows.append([r["arm"], *["-"] * (len(header) - 4), r["failed"], "-", "-"])
                continue
            s = r["summary"]
            rate = s["output_tokens_per_s"]
            rows.append(
                [
                    r["arm"],
                    "no usage" if rate is None else f"{rate:.1f}",
                    *(
                        report.seconds(s[key][p] if s[key] else None)
                        for key, p in (
                            ("ttft_s", "p50"),
                            ("ttft_s", "p90"),
                            ("itl_s", "p50"),
                            ("itl_s", "p99"),
                            ("tpot_s", "p50"),
                            ("e2e_s", "p50"),
                        )
                    ),
                    f"{'-' if s['cached_tokens'] is None else s['cached_tokens']} / {s['prompt_tokens']}",
                    str(s["num_errors"]),
                    " ".join(f"{k}:{v}" for k, v in s["finish_reasons"].items()),
                    f"{r['num_same_text']}/{s['num_requests']}",
                ]
            )
        lines += ["", f"## {name}", "", report.table(header, rows)]
    lines += ["", '"same text": answers equal to those of the first arm in the same load and repeat (greedy decoding).']
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when an arm did not start or a request failed."""
    args = _parser().parse_args(argv)
    settings = load()
    library = blas.find(args.blas)
    folder = peer_model.folder_for(args.model, settings)
    arms = [arm for arm in ARMS if arm.name in args.arms]
    pythons = {arm.name: python_of(arm, settings) for arm in arms}
    head = report.provenance("peers") | {
        "blas": library.name if library else None,
        "blas_threads": args.blas_threads,
        "model": folder.name,
        "arms": {a.name: version_of(pythons[a.name], a.package) if a.package else "this commit" for a in arms},
    }
    extra = blas.environment(library, args.blas_threads)
    threads = args.blas_threads or 0
    tandem_extra = {"TANDEM_BLAS": str(library) if library else "off", "TANDEM_BLAS_THREADS": str(threads)}

    def start(arm: Arm) -> AbstractContextManager[Target]:
        if arm.name == "tandem" and args.tandem_url:
            return nullcontext(Target(url=args.tandem_url.rstrip("/"), model=arm.model))
        return serving(arm, pythons[arm.name], folder, extra if arm.package else tandem_extra, log)

    log_path = Path(args.output).with_suffix(".log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    digests: dict[tuple[str, int, int], str | None] = {}
    with log_path.open("wb") as log:
        for repeat in range(args.repeats):
            for load_ in make_loads(args):
                # The order turns round at each repeat, so that a drift of the machine does not favour one arm.
                for arm in arms if repeat % 2 == 0 else reversed(arms):
                    entry: dict[str, Any] = {"arm": arm.name, "load": load_.name, "repeat": repeat}
                    results.append(entry)
                    print(f"{load_.name}: {arm.name}", file=sys.stderr)
                    try:
                        with start(arm) as target:
                            summary, played = play_load(load_, target, folder, repeat)
                    except (RuntimeError, httpx.HTTPError) as error:
                        entry["failed"] = f"{type(error).__name__}: {error}"
                        print(f"  {entry['failed']} (see {log_path})", file=sys.stderr)
                        continue
                    keys = [(load_.name, repeat, r.index) for r in played.records]
                    for key, record in zip(keys, played.records, strict=True):
                        digests.setdefault(key, record.text_sha256)
                    same = [digests[k] == r.text_sha256 for k, r in zip(keys, played.records, strict=True)]
                    entry |= {"workload": msgspec.to_builtins(load_), "summary": summary, "num_same_text": sum(same)}
                    entry["records"] = msgspec.to_builtins(played.records)
                    # After every load, so that a broken-off run leaves what it measured.
                    report.write_json(args.output, head | {"results": results})
    text = markdown(results, head)
    Path(args.output).with_suffix(".md").write_text(text)
    print(text)
    brief = [{k: v for k, v in r.items() if k not in ("records", "workload")} for r in results]
    report.print_last_line(head | {"results": brief})
    return 1 if any("failed" in r or r["summary"]["num_errors"] for r in results) else 0


def _names(*known: str) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(known):
            raise ValueError(f"{text!r} names something else than {', '.join(known)}")
        return chosen

    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = parser.add_argument
    names = [arm.name for arm in ARMS]
    add("--arms", type=_names(*names), default=names, help=f"some of {','.join(names)}")
    add("--tandem-url", help="a running Tandem to use for its arm; its caches are then as warm as they are")
    add("--model", default="default", help="as TANDEM_MODEL; a GGUF is converted to float32 once")
    add("--loads", type=_names(*KINDS), default=list(KINDS), help=f"some of {','.join(KINDS)}")
    add("--concurrency", type=concurrencies, default=[1, 4, 8])
    add("--requests-per-slot", type=int, default=3)
    add("--min-requests", type=int, default=4)
    add("--prompt-tokens", type=int, default=64)
    add("--output-tokens", type=int, default=64)
    add("--shared-prefix", type=int, default=600)
    add("--mixed", type=parse_range, default=(24, 600))
    add("--repeats", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--blas", default="auto", help='Linux without a GPU: "auto", "off" or a library, for every arm')
    add("--blas-threads", type=int, help="default: the library's own choice")
    output = report.REPOSITORY / "bench" / "results" / "peers.json"
    add("--output", default=str(output), help="JSON; also .md and .log beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
