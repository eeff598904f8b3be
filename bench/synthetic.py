"""Speculation with a given acceptance rate on a random model: what the engine makes of it, against what costs allow.

    python -m bench.synthetic --shape 8b --batches 1,4,8,16,32 --acceptance 0.8
    python -m bench.synthetic --shape gemma4-e4b --drafter assistant --batches 8

The real scheduler core and the real engine run in this process, and each drafted token is accepted with the given
chance, by a keyed draw: so every row of a batch accepts a number of its own. Drafts are tokens of no sense that arrive
after a given time (a busy wait, as a drafter on the same machine would take), or those of a Gemma 4 assistant: then the
rows that the target hands over and the drafter's forwards are part of the time.
Arms: plain decoding, the policy's own choice, and each fixed k that verify times were measured for. A rate is
of the time in which all rows run: from the last row's first token (with drafts: its first round, in which the drafter
takes the prompt in) to the first row's end. The speed-up that the costs allow is the best over k of
E(k) * plain / (verify(k) + draft(k)): verify(k) as measured at the start of a server, draft(k) as it was in the arm of
that k. Plain decoding is measured before the target keeps anything for a drafter.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from bench.model_shapes import ASSISTANTS, SHAPES, random_model
from bench.report import finish, provenance
from bench.synthetic_drafters import Coin, Drafter, RandomAssistant, WaitDrafter
from scheduler.core import Core
from scheduler.metrics import Metrics
from shared.config import Settings
from shared.messages import (
    DraftRequest,
    Hello,
    Message,
    Outputs,
    Ready,
    Rejected,
    Release,
    RequestId,
    SamplingParams,
    Step,
    Submit,
    Welcome,
    WorkerInfo,
)
from workers import cuda
from workers.build import make_engine, warm_up
from workers.calibrate import measure
from workers.engine import Engine, PendingStep
from workers.load import LoadedModel
from workers.own_attention import may_serve_all

REPEATS = 2  # of each arm; the best counts, since shapes are compiled in the first


def speculating_engine(loaded: LoadedModel) -> tuple[Engine, WorkerInfo]:
    """With the attention kernels that a server with a drafter would have on this machine."""
    settings = Settings(max_num_seqs=32, max_model_len=2048, max_num_batched_tokens=1024, draft_model="ngram")
    engine, info = make_engine(loaded, settings)
    warm_up(engine, info)
    return engine, info


class Loop:
    """Core and engine in one process, as the target process pipelines them."""

    def __init__(self, engine: Engine, info: WorkerInfo, drafter: Drafter | None = None, k: int | None = None) -> None:
        """`k`: how much the drafter drafts; None leaves it to the policy."""
        self.engine, self.drafter = engine, drafter
        self.core = Core(Settings(max_queue=4096, draft_model="none"), Metrics())
        self.steps: list[Step | Release] = []
        self.requests: list[DraftRequest] = []
        self.num_tokens = 0
        self.num_running = 0
        self.first_token_at: float | None = None
        self.ended: tuple[float, int] | None = None  # when the first row did, and the tokens until then
        self.phases: dict[str, float] = dict.fromkeys(("begin", "finish", "features", "draft", "core"), 0.0)
        self.num_steps = 0
        self.committed: list[list[int]] = []  # by round: the tokens that each row got
        self.send("front", Hello(role="frontend", instance_id="front", pid=1))
        self.send("target", Hello(role="target", instance_id="target", pid=2))
        self.send("target", Ready(epoch=self.epoch, info=info))
        if drafter is not None:
            drafter.reset()
            self.send("drafter", Hello(role="drafter", instance_id="drafter", pid=3))
            self.send("drafter", Ready(epoch=self.epoch, info=drafter.info(info)))
            self.core.speculator.forced_k = k

    def send(self, sender: str, message: Message) -> None:
        with self._timed("core"):
            replies = self.core.handle(sender, message, time.perf_counter())
        for _, out in replies:
            match out:
                case Welcome():
                    self.epoch = out.epoch
                case Rejected():
                    raise RuntimeError(f"a request was rejected: {out.message}")
                case Step() | Release():
                    self.steps.append(out)
                case DraftRequest():
                    self.requests.append(out)
                case Outputs():
                    self.first_token_at = self.first_token_at or time.perf_counter()
                    self.num_tokens += sum(len(o.token_ids) for o in out.outputs)
                    self.num_running -= sum(o.finish_reason is not None for o in out.outputs)
                    if self.ended is None and any(o.finish_reason is not None for o in out.outputs):
                        self.ended = time.perf_counter(), self.num_tokens

    def run(self, batch: int, num_tokens: int, prompt: int, rng: random.Random | None = None) -> float:
        """Decode tokens per second with `batch` rows that start together: all decode, none has ended.

        A second run goes on with what the policy learnt in the first.

        Args:
            prompt: its length.
            rng: draws the tokens of each row's prompt; without it all are the same.
        """
        self.ended = None
        for i in range(batch):
            name = RequestId(f"{self.num_tokens}-{i}")
            self.num_running += 1
            greedy = SamplingParams(temperature=0.0)
            tokens = [7 if rng is None else rng.randrange(self.engine.vocab_size) for _ in range(prompt)]
            self.send("front", Submit(request_id=name, prompt_token_ids=tokens, sampling=greedy, max_tokens=num_tokens))
        running: list[PendingStep] = []
        started, at_start = 0.0, 0
        while self.num_running > 0:
            while self.steps and len(running) < 2:
                message = self.steps.pop(0)
                if isinstance(message, Release):
                    self.engine.release(message.slots, message.stores)
                else:
                    with self._timed("begin"):
                        running.append(self.engine.begin(message))
                    self.num_steps += self.ended is None
            if running:
                self._finish(running.pop(0))
            if not started and self._is_everyone_there():  # before the drafts of a round, so that it is a whole one
                started, at_start = time.perf_counter(), self.num_tokens
                self.phases, self.num_steps, self.committed = dict.fromkeys(self.phases, 0.0), 0, []
            while self.requests:
                self._draft(self.requests.pop(0))
        assert self.ended is not None and 0.0 < started < self.ended[0], "requests of a few rounds"
        return (self.ended[1] - at_start) / (self.ended[0] - started)

    def _is_everyone_there(self) -> bool:
        """Every row has its first token; with a drafter also its first round, which takes the prompt in."""
        least = 1 if self.drafter is None else 2
        rows = self.core.running
        return not len(self.core.waiting) and all(len(s.token_ids) - s.num_prompt_tokens >= least for s in rows)

    def _finish(self, pending: PendingStep) -> None:
        with self._timed("finish"):
            finished = self.engine.finish(pending)
        if self.ended is None:
            self.committed.append([len(row.token_ids) for row in finished.rows])
        self.send("target", finished)
        if self.drafter is not None:  # after the result, as the target process does
            with self._timed("features"):
                self.drafter.features(pending, finished)

    def _draft(self, request: DraftRequest) -> None:
        assert self.drafter is not None, "drafts are asked of a drafter"
        with self._timed("draft"):
            reply = self.drafter.draft(request)
        self.send("drafter", reply)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Until the first row's end, as the rate is."""
        started = time.perf_counter()
        yield
        if self.ended is None:
            self.phases[phase] += time.perf_counter() - started

    def s_per_step(self, phase: str) -> float:
        return self.phases[phase] / max(1, self.num_steps)


@dataclass(frozen=True)
class Played:
    """What an arm showed while all rows ran."""

    tokens_per_s: float
    ms_per_step: dict[str, float]  # where a step's time went
    tokens_per_row: float  # committed in a round, mean
    ragged: float  # share of rounds in which not all rows committed as many
    draft_s: float  # of a round: the rows' way to the drafter, and its answer

    @classmethod
    def of(cls, loop: Loop, rate: float) -> Played:
        counts = [count for row in loop.committed for count in row]
        return cls(
            tokens_per_s=rate,
            ms_per_step={name: round(1000 * loop.s_per_step(name), 2) for name in loop.phases},
            tokens_per_row=sum(counts) / max(1, len(counts)),
            ragged=sum(len(set(row)) > 1 for row in loop.committed) / max(1, len(loop.committed)),
            draft_s=loop.s_per_step("features") + loop.s_per_step("draft"),
        )


class Arms:
    """Plays the arms of one batch size after another."""

    def __init__(self, engine: Engine, info: WorkerInfo, options: argparse.Namespace) -> None:
        self._engine, self._info, self._options = engine, info, options

    def plain(self, batch: int) -> Played:
        self._run(Loop(self._engine, self._info), batch, 48)  # kernels are compiled
        found = self._best(None, None, batch, self._options.output_tokens)
        self._engine.reset()
        return found

    def row(self, batch: int, drafter: Drafter, plain: Played, step_s: dict[int, float]) -> dict[str, Any]:
        """Rates, speed-up and phases of a batch size.

        Args:
            step_s: measured seconds of a step by width.
        """
        num_tokens = self._options.output_tokens
        self._run(Loop(self._engine, self._info, drafter), batch, 48)  # kernels are compiled
        arms = {"0": plain, "policy": self._best(drafter, None, batch, 2 * num_tokens)}
        fixed = {width - 1: self._best(drafter, width - 1, batch, num_tokens) for width in step_s if width > 1}
        arms |= {str(k): played for k, played in fixed.items()}
        allowed = max(
            (
                _expected(self._options.acceptance, k) * (batch / plain.tokens_per_s) / (step_s[k + 1] + played.draft_s)
                for k, played in fixed.items()
            ),
            default=1.0,
        )
        self._engine.reset()
        speed_up = arms["policy"].tokens_per_s / plain.tokens_per_s
        return {
            "batch": batch, "plain_tokens_per_s": plain.tokens_per_s,
            "policy_tokens_per_s": arms["policy"].tokens_per_s,
            "fixed_tokens_per_s": {str(k): round(played.tokens_per_s, 1) for k, played in fixed.items()},
            "speed_up": speed_up, "allowed": max(1.0, allowed), "share_of_allowed": speed_up / max(1.0, allowed),
            "ms_per_step": {name: played.ms_per_step for name, played in arms.items()},
            "tokens_per_row": {name: round(played.tokens_per_row, 3) for name, played in arms.items()},
            "ragged_rounds": {name: round(played.ragged, 3) for name, played in arms.items()},
        }  # fmt: skip

    def _best(self, drafter: Drafter | None, k: int | None, batch: int, num_tokens: int) -> Played:
        played = [self._play(drafter, k, batch, num_tokens) for _ in range(REPEATS)]
        return max(played, key=lambda found: found.tokens_per_s)

    def _play(self, drafter: Drafter | None, k: int | None, batch: int, num_tokens: int) -> Played:
        """The policy learns in a run before."""
        loop = Loop(self._engine, self._info, drafter, k)
        if drafter is not None and k is None:
            self._run(loop, batch, num_tokens)
        return Played.of(loop, self._run(loop, batch, num_tokens))

    def _run(self, loop: Loop, batch: int, num_tokens: int) -> float:
        """Rows with prompts of their own: alike, they would all read the same experts of a model that has some."""
        return loop.run(batch, num_tokens, self._options.prompt_tokens, random.Random(batch))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,4,8,16,32")
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--drafter", choices=("wait", "assistant"), default="wait", help="where drafts come from")
    parser.add_argument("--draft-ms", type=float, default=1.0, help="from request to reply, for `wait`")
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.drafter == "assistant" and options.shape not in ASSISTANTS:
        parser.error(f"an assistant is known for {', '.join(ASSISTANTS)}")
    cuda.prepare()  # as a server with a model of ours
    if may_serve_all(SHAPES[options.shape]):
        cuda.leave_out_graphs()
    mx.random.seed(0)
    loaded = random_model(options.shape, options.dtype)
    engine, info = speculating_engine(loaded)
    engine.count_accepted = Coin(options.acceptance).count
    batches = [int(batch) for batch in options.batches.split(",")]
    arms = Arms(engine, info, options)
    plain = {batch: arms.plain(batch) for batch in batches}
    drafter: Drafter = WaitDrafter(options.draft_ms / 1000)
    if options.drafter == "assistant":
        drafter = RandomAssistant(options.shape, loaded, engine)
    costs = measure(engine, info)
    arms = Arms(engine, msgspec.structs.replace(info, step_costs=costs), options)
    rows = []
    for batch in batches:
        step_s = {c.width: c.seconds for c in costs if c.batch == batch}
        rows.append(arms.row(batch, drafter, plain[batch], step_s))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, file=sys.stderr, flush=True)
    result = {
        **provenance("synthetic"), "acceptance": options.acceptance, "drafter": drafter.name,
        "drafter_parameters": drafter.num_parameters,
        "draft_ms": options.draft_ms if options.drafter == "wait" else None, "rows": rows,
        "step_costs": [_struct_cost(c) for c in costs],
    }  # fmt: skip
    finish(result, options.json)
    return 0


def _expected(chance: float, k: int) -> float:
    return sum(chance**j for j in range(k + 1))


def _struct_cost(cost: Any) -> dict[str, Any]:  # noqa: ANN401 - a StepCost
    return {"batch": cost.batch, "width": cost.width, "ms": round(cost.seconds * 1000, 3)}


if __name__ == "__main__":
    sys.exit(main())
