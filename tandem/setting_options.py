"""Settings as options of commands: typed by `shared.config.FIELDS`, described by the same text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from shared.config import FIELDS, Field, Value, parse
from tandem.layers import effective

_FILES = ("_file", "_dir", "_roots")
_Result = TypeVar("_Result")


class SettingType(click.ParamType[Value]):
    """A setting's value, checked by the rules that its variable and its key in tandem.toml follow too."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.name = "size" if field.name.endswith("_bytes") else {int: "n", float: "x"}.get(field.kind, "text")

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "|".join(word for word in self.field.choices if word) or self.name.upper()

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Value:
        return parse(self.field, str(value), "--" + self.field.name.replace("_", "-"))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self.field.choices:
            return [CompletionItem(word) for word in self.field.choices if word and word.startswith(incomplete)]
        is_file = self.field.name.endswith(_FILES) or self.field.name in ("model", "draft_model")
        return [CompletionItem(incomplete, type="file")] if is_file else []


class SettingOption(click.Option):
    def __init__(self, field: Field) -> None:
        self.field = field
        name = field.name.replace("_", "-")
        default = str(field.default).lower() if field.kind is bool else str(field.default)
        text = f"{field.text[0].upper()}{field.text[1:]}" + (f" [{default}]" if default else "")
        if field.kind is bool:
            super().__init__([f"--{name}/--no-{name}"], default=None, help=text)
        else:
            super().__init__([f"--{name}"], type=SettingType(field), default=None, help=text)


class SettingsCommand(click.Command):
    """A command whose help has its own options first, then settings under the headings of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                group = param.field.group if isinstance(param, SettingOption) else "Options"
                sections.setdefault(group, []).append(record)
        for heading, rows in sections.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def setting_options(names: Sequence[str] = ()) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """A decorator that adds `--config` and an option for each of these settings, by default for all.

    The function gets them as one argument, `found: Effective`.

    Raises:
        BadConfig: from the command: a flag, a variable or tandem.toml is wrong.
    """

    def add(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.wraps(function)
        def command(config: str | None, **options: Any) -> _Result:  # noqa: ANN401 # each option has its own type
            flags = {name: options.pop(name) for name in list(options) if name in chosen}
            given = {name: value for name, value in flags.items() if value is not None}
            return function(found=effective(given, config), **options)

        chosen = names or list(FIELDS)
        text = "Read this file instead of ./tandem.toml or ~/.config/tandem/tandem.toml."
        params: list[click.Option] = [SettingOption(FIELDS[name]) for name in chosen]
        params.insert(0, click.Option(["--config"], metavar="FILE", type=click.Path(), help=text))
        command.__dict__.setdefault("__click_params__", []).extend(reversed(params))  # as click's decorators do
        return command

    return add
