"""`tandem race`: the options of tandem/race.py."""

from __future__ import annotations

import click

from tandem import race


@click.command()
@click.option("--draft-model", required=True, metavar="TEXT", help="As for serve: a checkpoint, or ngram.")
@click.option("--model", default="default", show_default=True)
@click.option(
    "--prompts", metavar="FILE", type=click.Path(), help="One prompt on each line; default: eight of our own."
)
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Of each answer.")
@click.option("--json", is_flag=True, help="Print one JSON object instead of a table.")
def command(draft_model: str, model: str, prompts: str | None, max_tokens: int, json: bool) -> int:
    """Play greedy prompts with and without a drafter: equal texts, acceptance, speed."""
    return race.main(
        {"draft_model": draft_model, "model": model, "prompts": prompts, "max_tokens": max_tokens, "json": json}
    )
