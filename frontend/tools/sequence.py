"""Members of a list of which some may be left out, with a separator between those that are there."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import Rules


def separated(rules: Rules, members: Sequence[tuple[str, bool]], separator: str) -> str:
    """Members (expression, is_required) in order. Empty where there are none.

    Built from the end: what may follow member i is one rule if something stands before it, another if nothing does.
    """
    first, after = "", ""  # what follows, with nothing and with something before it
    between = rules.literal(separator)
    for body, is_required in reversed(members):
        following = f" {after}" if after else ""
        if is_required:
            first, after = rules.add(f"{body}{following}"), rules.add(f"{between} {body}{following}")
        elif first and not first.endswith("?"):  # left out, a later member still has to come
            skipped = rules.add(f"{body}{following} | {first}")
            first, after = skipped, rules.add(f"{between} {body}{following} | {after}")
        else:
            skipped_first, skipped_after = f" | {first}" if first else "", f" | {after}" if after else ""
            # A rule that may be empty is written as an optional use of one that may not.
            first_here, after_here = f"{body}{following}{skipped_first}", f"{between} {body}{following}{skipped_after}"
            first, after = f"{rules.add(first_here)}?", f"{rules.add(after_here)}?"
    return first
