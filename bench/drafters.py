"""What each drafter gives, by load and kind of text: `python -m bench.drafters --arms none,null,ngram,eagle3=FOLDER`.

Every cell (workload x concurrency) is played to every arm in turn, in another order each time, so that what the machine
does meanwhile falls on all of them. Speed-ups are over the plain arm (`none`) of the same cell and repeat; the arm
`null` is a second plain server, so what it differs from the first is noise. Answers are greedy and compared.
`--url NAME=URL` takes servers that run already, of any make that has the `vllm:spec_decode_*` counters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec
from tqdm import tqdm

from bench import draft_arms, parity, prompt_sets, report
from bench.ceiling import concurrencies
from bench.draft_arms import NULL, PLAIN, Arm, Running, Servers
from bench.draft_tables import markdown, overview
from bench.load import Target, play, summarize
from bench.workloads import Prompt
from tandem.draft_counters import DraftCounters, total

RESULTS = report.REPOSITORY / "bench" / "results"
Cell = tuple[str, int]  # workload, concurrency
Key = tuple[int, str, int, str]  # repeat, workload, concurrency, arm


class Turn(msgspec.Struct, frozen=True):
    """One cell played to one arm."""

    repeat: int
    workload: str
    concurrency: int
    arm: Arm

    @property
    def key(self) -> Key:
        return self.repeat, self.workload, self.concurrency, self.arm.name


def turns(arms: Sequence[Arm], cells: Sequence[Cell], repeats: int, is_interleaved: bool) -> Iterator[Turn]:
    """Everything to be played, in order.

    Interleaved: each cell goes round all arms before the next cell begins, starting with another arm each time.
    Otherwise each arm plays all cells of a repeat before the next arm begins, which needs one server at a time.
    """
    for repeat in range(repeats):
        if is_interleaved:
            for i, (workload, concurrency) in enumerate(cells):
                for arm in _rotated(arms, repeat * len(cells) + i):
                    yield Turn(repeat, workload, concurrency, arm)
        else:
            for arm in _rotated(arms, repeat):
                for workload, concurrency in cells:
                    yield Turn(repeat, workload, concurrency, arm)


def _rotated(arms: Sequence[Arm], by: int) -> list[Arm]:
    at = by % len(arms)
    return [*arms[at:], *arms[:at]]


class Bench:
    """Args:
    servers: of all arms.
    bar: advanced by one for each turn.
    """

    def __init__(self, args: argparse.Namespace, servers: Servers, bar: tqdm[Any]) -> None:
        self._args = args
        self._servers = servers
        self._bar = bar
        self._texts = {workload: prompt_sets.read(workload) for workload in args.workloads}
        self._warm: set[tuple[str, int]] = set()  # (URL, concurrency)
        self.entries: dict[Key, dict[str, Any]] = {}
        self.answers: dict[Key, dict[int, str]] = {}
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}  # arm -> why it is not played any more
        self.health: dict[str, Any] = {}

    def try_to_play(self, turn: Turn) -> None:
        """Nothing for an arm that failed; the others go on."""
        if turn.arm.name in self.failed:
            return
        try:
            self._play(turn)
        except (RuntimeError, httpx.HTTPError) as error:
            self.failed[turn.arm.name] = f"{type(error).__name__}: {error}"[:300]
            print(f"{turn.arm.name}: {self.failed[turn.arm.name]}", file=sys.stderr)

    def result(self, partings: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "health": self.health,
            "failed": self.failed,
            "left_out": self.left_out,
            "cells": list(self.entries.values()),
            "partings": partings,
        }

    def _play(self, turn: Turn) -> None:
        """Raises RuntimeError or httpx.HTTPError: its server failed."""
        self._bar.set_postfix_str(f"{turn.workload} c={turn.concurrency} {turn.arm.name}")
        running = self._servers.get(turn.arm)
        self.health[turn.arm.name] = running.health
        self._warm_up(running, turn)
        before = running.counters()
        played = asyncio.run(play(running.target, self.prompts(turn), turn.concurrency))
        after = running.counters()
        by_drafter = {name: c.since(before.get(name, DraftCounters())) for name, c in after.items()}
        self.entries[turn.key] = {
            "repeat": turn.repeat,
            "workload": turn.workload,
            "concurrency": turn.concurrency,
            "arm": turn.arm.name,
            "order": len(self.entries),
            "summary": summarize(played, turn.concurrency),
            "speculation": described(by_drafter),
        }
        self.answers[turn.key] = {r.index: r.text for r in played.records if r.error is None}

    def prompts(self, turn: Turn) -> list[Prompt]:
        """The same for all arms. Later repeats begin elsewhere in the set."""
        number = max(self._args.requests_per_cell, self._args.waves * turn.concurrency)
        tenant, tokens = f"{turn.repeat}/{turn.workload}/{turn.concurrency}", self._args.output_tokens
        prompts = prompt_sets.pick(self._texts[turn.workload], number, tokens, tenant, turn.repeat * number)
        if not self._args.vary_output:
            return prompts
        rng = random.Random(tenant)
        return [
            msgspec.structs.replace(prompt, max_tokens=rng.randint(tokens // 2, tokens + tokens // 2))
            for prompt in prompts
        ]

    def _warm_up(self, running: Running, turn: Turn) -> None:
        """Once for each server and concurrency, with requests that the cells do not repeat: kernels for these batch
        sizes are compiled, and the policy learns what rounds of them cost."""
        known = running.target.url, turn.concurrency
        if known in self._warm or self._args.warmup_tokens == 0:
            return
        self._warm.add(known)
        tenant = f"warm-up/{turn.concurrency}"
        texts = self._texts[turn.workload]
        prompts = prompt_sets.pick(texts, turn.concurrency, self._args.warmup_tokens, tenant, first=len(texts) // 2)
        asyncio.run(play(running.target, prompts, turn.concurrency))

    # ------------------------------------------------ parity

    def compare(self) -> list[dict[str, Any]]:
        """Count equal answers into the entries; the pairs that differ, each once, with the cells where it occurred."""
        pairs: dict[tuple[str, str, str, str], dict[str, Any]] = {}  # (arm, prompt, plain, other)
        for key, entry in self.entries.items():
            plain = self.answers.get((*key[:3], PLAIN))
            if plain is None or key[3] == PLAIN:
                continue
            own = self.answers[key]
            common = sorted(plain.keys() & own.keys())
            turn = Turn(key[0], key[1], key[2], Arm(name=key[3]))
            prompts = self.prompts(turn)
            entry["parity"] = {"compared": len(common), "identical": sum(plain[i] == own[i] for i in common)}
            for i in common:
                if plain[i] != own[i]:
                    name = key[3], prompts[i].text, plain[i], own[i]
                    pair = pairs.setdefault(name, {"arm": key[3], "workload": key[1], "keys": [], "prompt": prompts[i]})
                    pair |= {"plain": plain[i], "other": own[i]}
                    pair["keys"].append(key)
        return list(pairs.values())

    def judge(self, pairs: Sequence[dict[str, Any]], plain: Arm, deadline: float) -> list[dict[str, Any]]:
        """Ask the plain server which differences are ties; those that time leaves no room for are "unchecked"."""
        found = []
        running = self._servers.get(plain)
        with httpx.Client(base_url=running.target.url, trust_env=False) as client:
            for pair in tqdm(pairs, desc="ties", file=sys.stderr, disable=None, leave=False):
                verdict: dict[str, Any] = {"verdict": "unchecked"}
                if time.monotonic() < deadline:
                    try:
                        verdict = msgspec.to_builtins(
                            parity.judge(
                                client,
                                running.target,
                                pair["prompt"],
                                pair["plain"],
                                pair["other"],
                                self._args.tie_bound,
                            )
                        )
                    except (httpx.HTTPError, ValueError) as error:
                        verdict |= {"reason": str(error)[:200]}
                for key in pair["keys"]:
                    counts = self.entries[key]["parity"]
                    counts[verdict["verdict"]] = counts.get(verdict["verdict"], 0) + 1
                found.append({"arm": pair["arm"], "workload": pair["workload"], "num": len(pair["keys"]), **verdict})
        return found


def described(by_drafter: dict[str, DraftCounters]) -> dict[str, Any] | None:
    """Figures of a cell's drafts; None where the server has no such counters."""
    if not by_drafter:
        return None
    together = total(by_drafter)
    return {
        **msgspec.to_builtins(together, str_keys=True),
        "mean_acceptance_length": together.mean_acceptance_length,
        "acceptance_by_position": together.acceptance_by_position,
        "num_drafts_by_drafter": {name: c.num_drafts for name, c in by_drafter.items() if c.num_drafts},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when a request or a server failed, or an answer differs by more than a tie."""
    args = _parser().parse_args(argv)
    if args.plot:
        from bench.draft_plots import plot  # matplotlib is there for development only

        result = json.loads(Path(args.plot).read_text())
        for path in plot(result, Path(args.plot).with_suffix("")):
            print(path)
        return 0
    arms = draft_arms.parse_urls(args.url) if args.url else args.arms
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".log").open("wb") as log:
        result = measure(args, arms, log, lambda partial: report.write_json(output, partial))
    report.write_json(output, result)
    text = markdown(result)
    output.with_suffix(".md").write_text(text)
    print(text)
    _try_to_plot(result, output.with_suffix(""))
    report.print_last_line({k: v for k, v in result.items() if k not in ("cells", "partings", "health")})
    is_wrong = any(c["summary"]["num_errors"] for c in result["cells"]) or bool(result["failed"])
    return int(is_wrong or any(p["verdict"] == "other" for p in result["partings"]))


def measure(
    args: argparse.Namespace, arms: Sequence[Arm], log: IO[bytes], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Play everything that the time allows; `keep` gets what there is after each cell, so that a broken-off run leaves
    what it measured."""
    started = time.monotonic()
    is_interleaved = bool(args.url) or args.keep_alive
    cells = [(workload, concurrency) for workload in args.workloads for concurrency in args.concurrency]
    todo = list(turns(arms, cells, args.repeats, is_interleaved))
    base = Target(
        url="", model=args.model_name, ignore_eos=args.ignore_eos, api_key=args.api_key, timeout_s=args.timeout
    )
    with (
        Servers(args.model, base, {}, args.keep_alive, log) as servers,
        tqdm(total=len(todo), unit="cell", file=sys.stderr, disable=None) as bar,
    ):
        bench = Bench(args, servers, bar)
        head = report.provenance("drafters") | _head(args, arms, is_interleaved)
        if not args.url:
            bench.failed |= servers.start_all(arms)
        seconds = {"ready": time.monotonic() - started}
        for number, turn in enumerate(todo):
            if time.monotonic() - started > args.time_budget:
                bench.left_out.append("/".join(map(str, turn.key)))
            else:
                bench.try_to_play(turn)
            if number % len(arms) == len(arms) - 1:
                keep(head | bench.result([]) | {"seconds": seconds})
            bar.update(1)
        seconds["played"] = time.monotonic() - started
        pairs = bench.compare()
        plain = next((arm for arm in arms if arm.name == PLAIN and arm.name not in bench.failed), None)
        partings = bench.judge(pairs, plain, time.monotonic() + args.tie_time) if plain is not None and pairs else []
    seconds["all"] = time.monotonic() - started
    result = head | bench.result(partings) | {"seconds": seconds}
    return result | {"overview": overview(result)}


def _head(args: argparse.Namespace, arms: Sequence[Arm], is_interleaved: bool) -> dict[str, Any]:
    names = (
        "output_tokens", "vary_output", "requests_per_cell", "waves", "repeats", "warmup_tokens", "ignore_eos",
        "tie_bound",
    )  # fmt: skip
    hidden = {f"TANDEM_{name}" for name in ("API_KEYS", "ADMIN_KEY")}
    return {
        "model": args.model,
        "arms": [msgspec.to_builtins(arm) for arm in arms],
        "settings": {name: getattr(args, name) for name in names},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("TANDEM_") and k not in hidden},
        "is_interleaved": is_interleaved,
    }


def _try_to_plot(result: dict[str, Any], stem: Path) -> None:
    try:
        from bench.draft_plots import plot
    except ImportError:
        print(f"no matplotlib here; draw the plots with --plot {stem}.json elsewhere", file=sys.stderr)
        return
    plot(result, stem)


def _workloads(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = set(chosen) - set(prompt_sets.WORKLOADS)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not among {', '.join(prompt_sets.WORKLOADS)}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.drafters", description=__doc__)
    add = parser.add_argument
    add("--arms", type=draft_arms.parse_arms, default=draft_arms.parse_arms(f"{PLAIN},{NULL},ngram"),
        help="NAME or NAME=CHECKPOINT, comma separated; @K behind it drafts K tokens in every step")  # fmt: skip
    add("--url", action="append", default=[], metavar="NAME=URL", help="a running server, instead of --arms; repeat it")
    add("--model", default="default", help="as TANDEM_MODEL")
    add("--model-name", default="default", help="what requests to a --url server name")
    add("--api-key")
    add("--workloads", type=_workloads, default=list(prompt_sets.WORKLOADS), help="some of them, comma separated")
    add("--concurrency", type=concurrencies, default=[1, 2, 4, 8, 16, 32])
    add("--requests-per-cell", type=int, default=8, help="at least")
    add("--waves", type=int, default=1, help="at least so many requests for each client")
    add("--output-tokens", type=int, default=128)
    add("--vary-output", action="store_true",
        help="between half and one and a half of --output-tokens for each request, the same for all arms: else plain "
        "answers end together, and the next ones' prompts are computed at once")  # fmt: skip
    add("--ignore-eos", action="store_true", help="every answer gets all its tokens, however it would have ended")
    add("--repeats", type=int, default=2)
    add("--warmup-tokens", type=int, default=32, help="for each request of a warm-up; 0: none")
    add("--keep-alive", action="store_true", help="all servers at once, cells interleaved; needs the memory")
    add("--time-budget", type=float, default=float("inf"), help="seconds after which no further cell begins")
    add("--tie-bound", type=float, default=0.25, help="nats; bfloat16 logits of SmolLM2 are 0.125 apart")
    add("--tie-time", type=float, default=60.0, help="seconds for looking at answers that differ")
    add("--timeout", type=float, default=300.0, help="seconds for one request")
    add("--output", default=str(RESULTS / "drafters.json"), help="JSON; also .md, .log and two .png beside it")
    add("--plot", metavar="FILE", help="only draw the plots of this result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
