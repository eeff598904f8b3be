"""`tandem bench`: the front of the measuring scripts, which keep their own options."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import click
import httpx

from shared.errors import BadConfig, Unavailable

# Name -> what it measures. Each is the module bench.NAME.
BENCHES = {
    "serve": "load over HTTP against a running server: TTFT, ITL, TPOT, tokens/s",
    "drafters": "each drafter by load and kind of text, with servers of its own",
    "prefix": "the prefix cache: time to first token by tier, agents, with servers of its own",
}


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    epilog="Each has its own options: `tandem bench serve --help`.",
)
@click.argument("name", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(name: str | None, arguments: tuple[str, ...]) -> int:
    """Run the benchmark NAME with ARGUMENTS: serve, drafters or prefix."""
    context = click.get_current_context()
    if name in (None, "-h", "--help"):
        click.echo(context.get_help())
        click.echo("\n" + "\n".join(f"  {known:<9} {text}" for known, text in BENCHES.items()))
        return 0
    if name not in BENCHES:
        raise click.UsageError(f"No benchmark {name!r}; these are: {', '.join(BENCHES)}.", context)
    if importlib.util.find_spec("bench") is None:
        raise BadConfig("the package `bench` is not installed: run this in a checkout of Tandem")
    if importlib.util.find_spec(f"bench.{name}") is None:
        raise BadConfig(f"this installation has no benchmark {name!r}")
    try:
        sys.argv = [f"bench.{name}", *arguments]  # what a result says of how it was made
        code: int = importlib.import_module(f"bench.{name}").main(list(arguments))
    except httpx.TransportError as error:
        raise Unavailable(f"the server cannot be reached ({error}): start one, or give its --url") from error
    return code
