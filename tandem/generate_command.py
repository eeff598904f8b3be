"""`tandem generate`: one prompt, answered by a model in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from shared.errors import BadConfig
from tandem.layers import Effective
from tandem.local.settings import NAMES, in_this_process
from tandem.results import Piece, Result, Stats, joined
from tandem.setting_options import SettingsCommand, setting_options

EXIT_INTERRUPTED = 130
_SETTINGS = [name for name in NAMES if name != "enable_thinking"]  # --thinking says it for the one prompt that there is
EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Option names -> the API's field. Names of mlx_lm and mlx_vlm are known beside the API's own.
_NUMBERS: dict[str, tuple[tuple[str, ...], type, str]] = {
    "max_tokens": (("--max-tokens", "-m"), int, "Tokens of the output; default: what the context holds."),
    "min_tokens": (("--min-tokens",), int, "Tokens before the output may end."),
    "temperature": (("--temperature", "--temp", "-t"), float, "0 is greedy."),
    "top_p": (("--top-p",), float, "Nucleus sampling."),
    "top_k": (("--top-k",), int, "The most likely tokens only; 0: off."),
    "min_p": (("--min-p",), float, "Tokens at least so likely, relative to the likeliest."),
    "repetition_penalty": (("--repetition-penalty",), float, "Over prompt and output."),
    "presence_penalty": (("--presence-penalty",), float, "Over the output."),
    "frequency_penalty": (("--frequency-penalty",), float, "Over the output."),
    "seed": (("--seed",), int, "Makes the output a function of the request."),
    "thinking_budget": (("--thinking-budget",), int, "Tokens of reasoning before it is closed."),
}


def _sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, (flags, kind, text) in reversed(_NUMBERS.items()):
        function = click.option(*flags, name, type=kind, help=text)(function)
    return function


@click.command(cls=SettingsCommand)
@click.argument("prompt", required=False)
@click.option("--prompt", "-p", "named_prompt", metavar="TEXT", help="The same as PROMPT.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--image", "images", multiple=True, metavar="FILE", help="An image, by path or URL; may be repeated.")
@click.option("--audio", "audio", multiple=True, metavar="FILE", help="A sound file; may be repeated.")
@click.option("--video", "videos", multiple=True, metavar="FILE", help="A video; may be repeated.")
@click.option("--adapter", metavar="NAME", help="One of --adapters to answer with.")
@click.option("--raw", is_flag=True, help="Go on with the prompt as it stands, without the chat template.")
@_sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="The output ends before it; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token.")
@click.option("--json-schema", metavar="FILE|JSON", help="The answer is JSON that matches it.")
@click.option("--regex", metavar="TEXT", help="The answer matches it.")
@click.option("--choice", multiple=True, metavar="TEXT", help="The answer is one of these; may be repeated.")
@click.option("--grammar", metavar="FILE", type=click.Path(), help="The answer matches this Lark or EBNF grammar.")
@click.option("--thinking/--no-thinking", default=None, help="Whether to reason first; default: the model's own way.")
@click.option("--reasoning-effort", type=click.Choice(EFFORTS), help="How much.")
@click.option("--show-thinking/--hide-thinking", default=None, help="Print the reasoning too; default: in a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, with token ids and counters.")
@click.option("--quiet", "-q", is_flag=True, help="No summary on standard error.")
@setting_options(_SETTINGS)
def command(
    prompt: str | None,
    named_prompt: str | None,
    system: str | None,
    raw: bool,
    show_thinking: bool | None,
    as_json: bool,
    quiet: bool,
    found: Effective,
    **options: Any,  # noqa: ANN401 - click hands over what the options' types made
) -> int:
    """Answer one PROMPT, or what comes on standard input, without a server.

    The text streams to standard output, counters go to standard error. Ctrl-C ends it with the counters so far.
    """
    text = _prompt(prompt, named_prompt)
    chosen = {name for name, source in found.sources.items() if source.startswith("--")}
    wanted = _options(options)
    from tandem.local.model import LocalModel

    with LocalModel(in_this_process(found.settings, dict.fromkeys(chosen))) as model:
        request: Any = text if raw else _messages(text, system)
        if raw and system is not None:
            raise click.UsageError("--system needs the chat template, which --raw leaves out.")
        if not raw and not model.has_chat_template:
            raise BadConfig(f"{model.name} has no chat template: --raw goes on with the prompt as it stands")
        printer = _Printer(as_json, sys.stdout.isatty() if show_thinking is None else show_thinking)
        with model.stream(request, **wanted) as stream:
            try:
                for piece in stream:
                    printer.take(piece)
            except KeyboardInterrupt:
                stream.close()
                printer.is_interrupted = True
        printer.end(model.name)
    if not quiet:
        print(summary(printer.result.stats, printer.ending), file=sys.stderr)
    return EXIT_INTERRUPTED if printer.is_interrupted else 0


def _prompt(prompt: str | None, named: str | None) -> str:
    if prompt is not None and named is not None:
        raise click.UsageError("Give PROMPT or --prompt, not both.")
    text = prompt if prompt is not None else named
    if text is None and sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, or one on standard input.")
    if text is None or text == "-":
        text = sys.stdin.read()
    if not text.strip():
        raise click.UsageError("The prompt is empty.")
    return text


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """The API's options of what was given."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "thinking" in given:
        given["enable_thinking"] = given.pop("thinking")
    if "json_schema" in given:
        given["json_schema"] = _schema(given["json_schema"])
    if "grammar" in given:
        given["grammar"] = _read(given["grammar"], "--grammar")
    return given


def _schema(given: str) -> dict[str, Any]:
    text = given if given.lstrip().startswith("{") else _read(given, "--json-schema")
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise click.UsageError(f"--json-schema: {error}.") from error


def _read(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{option} {path}: {error}.") from error


class _Printer:
    """Pieces to the terminal as they come, or all of them as JSON at the end."""

    def __init__(self, as_json: bool, shows_reasoning: bool) -> None:
        self.is_interrupted = False
        self._as_json = as_json
        self._shows_reasoning = shows_reasoning and not as_json
        self._pieces: list[Piece] = []
        self._is_reasoning = False

    @property
    def result(self) -> Result:
        return joined(self._pieces)

    @property
    def ending(self) -> str:
        return "interrupted" if self.is_interrupted else self.result.finish_reason or "unfinished"

    def take(self, piece: Piece) -> None:
        self._pieces.append(piece)
        if self._as_json:
            return
        if piece.reasoning and self._shows_reasoning:
            self._is_reasoning = True
            click.secho(piece.reasoning, dim=True, nl=False)
        if piece.text:
            if self._is_reasoning:
                print("\n")
                self._is_reasoning = False
            print(piece.text, end="")
        for call in piece.tool_calls:
            print(f"\n{call.name}({call.arguments})", end="")
        sys.stdout.flush()

    def end(self, model: str) -> None:
        if not self._as_json:
            print()
            return
        result = self.result
        content = {"model": model, **msgspec.to_builtins(result), "finish_reason": self.ending}
        content["stats"] |= {
            "prompt_tokens_per_s": result.stats.prompt_tokens_per_s,
            "tokens_per_s": result.stats.tokens_per_s,
            "acceptance_rate": result.stats.acceptance_rate,
        }
        print(msgspec.json.encode(content).decode())


def summary(stats: Stats, ending: str) -> str:
    """Counters in one line for a person."""
    parts: Sequence[str] = (
        f"prompt {stats.num_prompt_tokens} tokens, {stats.prompt_tokens_per_s:.1f} tokens/s",
        f"output {stats.num_output_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s",
        f"accepted {stats.num_accepted_tokens} of {stats.num_draft_tokens} drafted" if stats.num_draft_tokens else "",
        f"peak memory {stats.peak_memory_bytes / 1e9:.2f} GB",
        ending,
    )
    return "[" + "; ".join(part for part in parts if part) + "]"
