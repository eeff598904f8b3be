"""What the prefix cache gives: `python -m bench.prefix`.

Starts its own servers with the model given. Three measurements: time to first token (TTFT) of a conversation of which
all but a user's few words are cached, a long system prompt, against a like one cold; the same after a restart, from
SSD; and an agent workload, several agents at once that share a long system prompt and take turns, with the cache and
without it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec
from tqdm import tqdm

from bench import report
from bench.load import Record, Target, play
from bench.peers import ARMS, serving
from bench.workloads import Prompt, TokenCounter, choose_counter, fit

SECONDS_TO_SETTLE = 60.0  # for the last blocks to be on SSD
TEMPLATE_TOKENS = 16  # about what a chat template puts around two messages

Chat = list[dict[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    log_path = Path(args.log).expanduser()
    with tempfile.TemporaryDirectory(prefix="tandem-prefix-") as scratch, log_path.open("wb") as log:
        bench = Bench(args, Path(scratch), log)
        result = report.provenance("prefix") | {"ttft": bench.ttft(), "agents": {"agents": args.agents}}
        keep(args.json, result)
        for name, is_cached, turns in (("cached", True, args.turns), ("plain", False, args.turns_without)):
            if turns:
                result["agents"][name] = bench.agents(is_cached, turns)
                keep(args.json, result)
    print(markdown(result), file=sys.stderr)
    report.print_last_line({k: result[k] for k in ("benchmark", "ttft", "agents")})
    return 0


def keep(path: str | None, result: dict[str, Any]) -> None:
    """What there is so far: the last measurement takes as long as all others, and may fail."""
    if path:
        report.write_json(path, result)


class Bench:
    """Args:
    scratch: where the servers keep their SSD tier.
    log: takes the servers' output.
    """

    def __init__(self, args: argparse.Namespace, scratch: Path, log: IO[bytes]) -> None:
        self._args = args
        self._scratch = scratch
        self._log = log

    def _server(self, cache: bool) -> AbstractContextManager[Target]:
        extra = {"TANDEM_PREFIX_DIR": str(self._scratch), "TANDEM_PREFIX_CACHE": "1" if cache else "0"}
        return serving(ARMS[0], Path(sys.executable), Path(self._args.model), extra, self._log)

    # ------------------------------------------------ one long prompt

    def ttft(self) -> dict[str, Any]:
        """Seconds to the first token: cold, from the device tier, and from SSD after a restart."""
        args = self._args
        rng = random.Random(args.seed)
        with self._server(cache=True) as target:
            target = msgspec.structs.replace(target, ignore_eos=True)
            count, close = choose_counter(target.url, target.model, None)
            prompts = [self._pair(rng, count) for _ in range(args.repeats)]
            warm_up = self._pair(random.Random("warm-up"), count)  # kernels for these shapes are there after it
            close()
            records = self._each(target, [chat for pair in (warm_up, *prompts) for chat in pair], "TTFT")
            played = {"cold": records[2::2], "warm": records[3::2]}
            if not args.no_ssd:
                _wait_for_ssd(target)
        if not args.no_ssd:
            with self._server(cache=True) as target:
                target = msgspec.structs.replace(target, ignore_eos=True)
                chats = [self._short(), *(first for first, _ in prompts)]
                played["ssd"] = self._each(target, chats, "TTFT from SSD")[1:]
        figures: dict[str, dict[str, Any]] = {
            name: {
                "ttft_s": report.spread([r.ttft_s for r in records if r.ttft_s is not None]),
                # from the scheduler's first sight of a request to its first token; the rest is the frontend's and ours
                "scheduled_ms": report.spread([_scheduled_ms(r) for r in records]),
                "prompt_tokens": [r.prompt_tokens for r in records],
                "cached_tokens": [r.cached_tokens for r in records],
            }
            for name, records in played.items()
        }
        base = figures["cold"]["ttft_s"]["p50"]
        for name in list(figures)[1:]:
            figures[name]["share_of_cold"] = figures[name]["ttft_s"]["p50"] / base
        return figures

    def _pair(self, rng: random.Random, count: TokenCounter) -> tuple[Chat, Chat]:
        """Two conversations with one long system prompt that differ in the user's few words."""
        args = self._args
        text = fit(rng, args.prompt_tokens - args.tail_tokens - TEMPLATE_TOKENS, count)
        first, second = (
            [
                {"role": "system", "content": text},
                {"role": "user", "content": " ".join(f"{rng.randrange(10)}" for _ in range(args.tail_tokens // 2))},
            ]
            for _ in range(2)
        )
        return first, second

    def _short(self) -> Chat:
        """Opens the connection and runs every process once; cached by nobody."""
        return [{"role": "user", "content": "Hello."}]

    def _each(self, target: Target, chats: Sequence[Chat], what: str) -> list[Record]:
        """One after the other, over one connection, as an SDK's client keeps it."""
        prompts = [Prompt(index=i, text="", num_tokens=0, max_tokens=4, messages=c) for i, c in enumerate(chats)]
        with tqdm(desc=what, total=len(prompts), file=sys.stderr) as progress:

            def ended(_: Record) -> None:
                progress.update()

            records = asyncio.run(play(target, prompts, 1, ended)).records
        for record in records:
            if record.error is not None:
                raise RuntimeError(f"a request failed: {record.status} {record.error}")
        return records

    # ------------------------------------------------ agents

    def agents(self, is_cached: bool, turns: int) -> dict[str, Any]:
        """Turns of several agents at once."""
        args = self._args
        with self._server(is_cached) as target:
            target = msgspec.structs.replace(target, timeout_s=args.timeout)
            count, close = choose_counter(target.url, target.model, None)
            system = fit(random.Random(args.seed), args.system_tokens, count, "You are an agent with these tools:")
            close()
            by_turn = asyncio.run(self._play_agents(target, system, turns))
        later = [r for turn in by_turn[1:] for r in turn] or by_turn[0]
        prompt_tokens = sum(r.prompt_tokens or 0 for r in later)
        return {
            "turns": turns,
            "first_turn_ttft_s": report.spread([r.ttft_s for r in by_turn[0] if r.ttft_s is not None]),
            "later_ttft_s": report.spread([r.ttft_s for r in later if r.ttft_s is not None]),
            "later_prompt_tokens": prompt_tokens,
            "later_cached_share": sum(r.cached_tokens or 0 for r in later) / prompt_tokens,
        }

    async def _play_agents(self, target: Target, system: str, turns: int) -> list[list[Record]]:
        """Records by turn. Each agent sends its whole conversation every time, as agents do."""
        args = self._args
        rngs = [random.Random(args.seed + 1 + i) for i in range(args.agents)]
        chats = [[{"role": "system", "content": system}] for _ in rngs]
        by_turn: list[list[Record]] = []
        for turn in tqdm(range(turns), desc="turns", file=sys.stderr):
            for chat, rng in zip(chats, rngs, strict=True):
                told = " ".join(f"{rng.randrange(100)}" for _ in range(args.turn_tokens // 2))
                chat.append({"role": "user", "content": f"Turn {turn}: the tool says {told}"})
            played = [
                play(msgspec.structs.replace(target, extra_body={"messages": chat}), [self._turn(i)], 1)
                for i, chat in enumerate(chats)
            ]
            records = [(await one).records[0] for one in [asyncio.ensure_future(p) for p in played]]
            for record, chat in zip(records, chats, strict=True):
                if record.error is not None:
                    raise RuntimeError(f"a turn failed: {record.status} {record.error}")
                chat.append({"role": "assistant", "content": record.text})
            by_turn.append(records)
        return by_turn

    def _turn(self, index: int) -> Prompt:
        return Prompt(index=index, text="", num_tokens=0, max_tokens=self._args.output_tokens)


def _scheduled_ms(record: Record) -> float:
    assert record.timings is not None, "our own servers tell their timings"
    return float(record.timings["queue_ms"]) + float(record.timings["prompt_ms"])


def _wait_for_ssd(target: Target) -> None:
    """Until as many blocks are on SSD as on the device: they are written when the target is idle."""
    with httpx.Client(base_url=target.url, timeout=10.0, trust_env=False) as client:
        for _ in tqdm(range(int(SECONDS_TO_SETTLE * 5)), desc="waiting for SSD", file=sys.stderr, leave=False):
            tiers = client.get("/v1/cache").json()["tiers"]
            if tiers["ssd"]["entries"] >= tiers["device"]["entries"]:
                return
            asyncio.run(asyncio.sleep(0.2))
    raise RuntimeError("the blocks are not on SSD in time")


def markdown(result: dict[str, Any]) -> str:
    ttft, agents = result["ttft"], result["agents"]
    rows = [
        [name, report.seconds(f["ttft_s"]["p50"]), f"{f['share_of_cold']:.1%}" if "share_of_cold" in f else "100 %",
         f"{max(f['cached_tokens'])} of {max(f['prompt_tokens'])}"]
        for name, f in ttft.items()
    ]  # fmt: skip
    table = report.table(["prompt", "TTFT p50", "of cold", "cached tokens"], rows)
    rows = [
        [name, str(f["turns"]), report.seconds(f["first_turn_ttft_s"]["p50"]),
         report.seconds(f["later_ttft_s"]["p50"]), f"{f['later_cached_share']:.1%}"]
        for name, f in agents.items() if isinstance(f, dict)
    ]  # fmt: skip
    head = ["agents", "turns", "first turn's TTFT p50", "later turns' TTFT p50", "prompt tokens from the cache"]
    return f"{table}\n\n{agents['agents']} agents\n{report.table(head, rows)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--tail-tokens", type=int, default=32, help="tokens at a prompt's end that are not cached")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-ssd", action="store_true", help="no restart after which prefixes come from SSD")
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--turns-without", type=int, default=2, help="turns without the cache; 0: none")
    parser.add_argument("--system-tokens", type=int, default=6000)
    parser.add_argument("--turn-tokens", type=int, default=40, help="new tokens of a user's turn")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one answer of an agent")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--log", default="/dev/null", help="the servers' output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
