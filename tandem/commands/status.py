"""`tandem status`: a live table of a running server."""

from __future__ import annotations

import time

import click
import httpx
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.connection import connect, server_options
from tandem.layers import Effective
from tandem.setting_options import setting_options
from tandem.snapshot import Snapshot, Status, compare, take
from tandem.units import size

_COLOURS = {"ready": "green", "ok": "green", "silent": "red", "lost": "red", "unavailable": "red"}


@click.command()
@click.option("--once", is_flag=True, help="Print it once and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and end.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds; rates are of it."
)
@server_options
@setting_options(["host", "port"])
def command(once: bool, as_json: bool, interval: float, url: str | None, api_key: str | None, found: Effective) -> int:
    """Show processes, slots, throughput, acceptance and cache hits of a running server, until Ctrl-C."""
    with connect(found.settings, url, api_key) as client:
        before = take(client)
        if once or as_json:
            status = _next(client, before, interval)[0]
            if as_json:
                click.echo(msgspec.json.encode(status))
            else:
                Console().print(table(status))
            return 0
        with Live(table(compare(before, before, str(client.base_url))), auto_refresh=False, screen=False) as live:
            while True:
                status, before = _next(client, before, interval)
                live.update(table(status), refresh=True)


def _next(client: httpx.Client, before: Snapshot, interval: float) -> tuple[Status, Snapshot]:
    time.sleep(interval)  # the time that rates are measured over
    now = take(client)
    return compare(before, now, str(client.base_url)), now


def table(status: Status) -> Group:
    """Which server, its processes, and what they do."""
    processes = Table("process", "state", "restarts", "memory")
    for process in status.processes:
        colour = _COLOURS.get(process.state, "yellow")
        processes.add_row(
            process.name,
            f"[{colour}]{process.state}[/{colour}]",
            "-" if process.restarts is None else str(process.restarts),
            "-" if process.memory_bytes is None else size(process.memory_bytes),
        )
    facts = Table.grid(padding=(0, 2))
    slots = f" of {status.num_slots} slots" if status.num_slots else ""
    for name, value in (
        ("running", f"{_count(status.num_running)}{slots}, {_count(status.num_waiting)} waiting"),
        ("KV memory", f"{status.kv_usage:.0%} held"),
        (
            "throughput",
            f"{status.output_tokens_per_s:.1f} output tokens/s, {status.prompt_tokens_per_s:.1f} prompt tokens/s",
        ),
        ("latency", f"first token {_ms(status.ttft_ms)}, then {_ms(status.itl_ms)} (means since the start)"),
        ("acceptance", _acceptance(status)),
        ("cache hits", _cache(status)),
    ):
        facts.add_row(name, value)
    return Group(Text(f"{status.model} at {status.url}"), processes, facts)


def _count(number: int | None) -> str:
    return "?" if number is None else str(number)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _acceptance(status: Status) -> str:
    if not status.acceptance:
        return "nothing drafted yet"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(status.acceptance.items()))
    return f"{shares} of {status.draft_tokens} drafted tokens"


def _cache(status: Status) -> str:
    if status.cache_hit_rate is None:
        return "no prompt yet"
    held = ", ".join(f"{tier} {size(num_bytes)}" for tier, num_bytes in sorted(status.cache_bytes.items()))
    return f"{status.cache_hit_rate:.0%} of prompt tokens" + (f"; {held}" if held else "")
