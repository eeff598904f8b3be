"""Speculation with a given acceptance rate on a random model: what the engine makes of it, against what costs allow.

`python -m bench.synthetic --shape 8b --batches 1,4,8,16,32 --acceptance 0.8`

The real scheduler core and the real engine run in this process; drafts are random tokens that arrive after a given time
(a busy wait, as a drafter on the same machine would take), and each drafted token is accepted with the given chance,
by a keyed draw.
Arms: plain decoding, the policy's own choice, and each fixed k that verify times were measured for. A rate is
of the time in which all rows run: from the last row's first token to the first row's end. The speed-up that the costs
allow is the best over k of E(k) * plain / (verify(k) + draft(k)), from the measured verify times.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.model_shapes import SHAPES, random_model
from bench.report import print_last_line, provenance, write_json
from scheduler.core import Core
from scheduler.metrics import Metrics
from shared.config import Settings
from shared.messages import (
    Draft,
    DraftReply,
    DraftRequest,
    Hello,
    Message,
    Outputs,
    Ready,
    Release,
    RequestId,
    SamplingParams,
    Step,
    Submit,
    Welcome,
    WorkerInfo,
)
from workers import cuda
from workers.build import make_engine, select_attention, warm_up
from workers.calibrate import measure
from workers.engine import Engine, PendingStep
from workers.load import LoadedModel
from workers.sampling.uniform import uniform

MAX_K = 7
REPEATS = 2  # of plain decoding and of the policy; the best counts


def speculating_engine(loaded: LoadedModel) -> tuple[Engine, WorkerInfo]:
    """With the attention kernels that a server with a drafter would have on this machine."""
    settings = Settings(max_num_seqs=32, max_model_len=2048, max_num_batched_tokens=1024, draft_model="ngram")
    engine, info = make_engine(loaded, settings)
    info = select_attention(loaded, engine, info, settings)
    warm_up(engine, info)
    return engine, info


class Loop:
    """Core and engine in one process, as the target process pipelines them."""

    def __init__(self, engine: Engine, info: WorkerInfo, draft_s: float, k: int | None) -> None:
        """`k`: 0 without a drafter, a number for a fixed k, None for the policy."""
        self.engine, self.draft_s = engine, draft_s
        self.core = Core(Settings(max_queue=4096, draft_model="none"), Metrics())
        self.steps: list[Step | Release] = []
        self.requests: list[DraftRequest] = []
        self.num_tokens = 0
        self.num_running = 0
        self.first_token_at: float | None = None
        self.ended: tuple[float, int] | None = None  # when the first row did, and the tokens until then
        self.phases: dict[str, float] = dict.fromkeys(("begin", "finish", "draft", "core"), 0.0)  # seconds
        self.num_steps = 0
        self.send("front", Hello(role="frontend", instance_id="front", pid=1))
        self.send("target", Hello(role="target", instance_id="target", pid=2))
        self.send("target", Ready(epoch=self.epoch, info=info))
        if k != 0:
            self.send("drafter", Hello(role="drafter", instance_id="drafter", pid=3))
            draft_info = {**_struct(info), "draft_kind": "synthetic", "max_draft_tokens": MAX_K}
            self.send("drafter", Ready(epoch=self.epoch, info=WorkerInfo(**draft_info)))
            self.core.speculator.forced_k = k

    def send(self, sender: str, message: Message) -> None:
        started = time.perf_counter()
        replies = self.core.handle(sender, message, started)
        self.phases["core"] += time.perf_counter() - started
        for _, out in replies:
            match out:
                case Welcome():
                    self.epoch = out.epoch
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

    def run(self, batch: int, num_tokens: int, prompt: int) -> float:
        """Decode tokens per second with `batch` rows that start together: all have a token, none has ended.

        A second run goes on with what the policy learnt in the first.
        """
        self.ended = None
        for i in range(batch):
            name = RequestId(f"{self.num_tokens}-{i}")
            self.num_running += 1
            greedy = SamplingParams(temperature=0.0)
            self.send(
                "front", Submit(request_id=name, prompt_token_ids=[7] * prompt, sampling=greedy, max_tokens=num_tokens)
            )
        running: list[PendingStep] = []
        started, at_start = 0.0, 0
        while self.num_running > 0:
            while self.steps and len(running) < 2:
                message = self.steps.pop(0)
                if isinstance(message, Release):
                    self.engine.release(message.slots)
                else:
                    with self._timed("begin"):
                        running.append(self.engine.begin(message))
                    self.num_steps += 1
            if running:
                with self._timed("finish"):
                    finished = self.engine.finish(running.pop(0))
                self.send("target", finished)
            while self.requests:
                with self._timed("draft"):
                    self._draft(self.requests.pop(0))
            if not started and all(s.first_token for s in self.core.running) and not len(self.core.waiting):
                started, at_start = time.perf_counter(), self.num_tokens
                self.phases, self.num_steps = dict.fromkeys(self.phases, 0.0), 0
        assert self.ended is not None and started, "requests of more than one token"
        return (self.ended[1] - at_start) / (self.ended[0] - started)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases[phase] += time.perf_counter() - started

    @property
    def ms_per_step(self) -> dict[str, float]:
        """Where a step's time went; "draft" holds the core's part of it, too."""
        return {name: round(1000 * seconds / max(1, self.num_steps), 2) for name, seconds in self.phases.items()}

    def _draft(self, request: DraftRequest) -> None:
        until = time.perf_counter() + self.draft_s
        drafts = [
            Draft(request_id=r.request_id, anchor=r.start + len(r.token_ids) - 1, token_ids=[11] * r.num_tokens)
            for r in request.rows
        ]
        while time.perf_counter() < until:
            pass
        self.send("drafter", DraftReply(epoch=request.epoch, draft_id=request.draft_id, drafts=drafts, seconds=0.0))


def _struct(info: WorkerInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__struct_fields__}


class Coin:
    """Accepts each drafted token with the given chance; the same draws in every arm."""

    def __init__(self, chance: float) -> None:
        self.chance = chance
        self.num_rows = 0

    def count(self, draft_token_ids: Sequence[int], target_token_ids: Sequence[int]) -> int:
        """How many of a row's drafts are accepted; stands in for `workers.accept.count_accepted`."""
        drafts = draft_token_ids
        self.num_rows += 1
        n = 0
        while n < len(drafts) and uniform(self.num_rows, n) < self.chance:
            n += 1
        return n


class Arms:
    """Plays the arms of one batch size after another."""

    def __init__(self, engine: Engine, info: WorkerInfo, options: argparse.Namespace) -> None:
        self._engine, self._info, self._options = engine, info, options
        self._draft_s = options.draft_ms / 1000

    def row(self, batch: int, step_s: dict[int, float]) -> dict[str, Any]:
        """Rates, speed-up and phases of a batch size.

        Args:
            step_s: measured seconds of a step by width.
        """
        num_tokens = self._options.output_tokens
        self._loop(None).run(batch, 48, self._options.prompt_tokens)  # kernels are compiled
        ms_per_step: dict[str, dict[str, float]] = {}

        plain, ms_per_step["0"] = self._best(0, batch, num_tokens)
        policy, ms_per_step["policy"] = self._best(None, batch, 2 * num_tokens)
        fixed: dict[str, float] = {}
        for width in step_s:
            if width > 1:
                name = str(width - 1)
                fixed[name], ms_per_step[name] = self._play(width - 1, batch, num_tokens)
        allowed = max(
            (
                _expected(self._options.acceptance, width - 1) * (batch / plain) / (seconds + self._draft_s)
                for width, seconds in step_s.items()
                if width > 1
            ),
            default=1.0,
        )
        return {
            "batch": batch, "plain_tokens_per_s": plain, "policy_tokens_per_s": policy,
            "fixed_tokens_per_s": {k: round(rate, 1) for k, rate in fixed.items()},
            "speed_up": policy / plain, "allowed": max(1.0, allowed),
            "share_of_allowed": policy / plain / max(1.0, allowed), "ms_per_step": ms_per_step,
        }  # fmt: skip

    def _loop(self, k: int | None) -> Loop:
        return Loop(self._engine, self._info, self._draft_s, k)

    def _best(self, k: int | None, batch: int, num_tokens: int) -> tuple[float, dict[str, float]]:
        return max((self._play(k, batch, num_tokens) for _ in range(REPEATS)), key=lambda found: found[0])

    def _play(self, k: int | None, batch: int, num_tokens: int) -> tuple[float, dict[str, float]]:
        """(tokens per second, milliseconds of a step by phase); the policy learns in a run before."""
        loop = self._loop(k)
        if k is None:
            loop.run(batch, num_tokens, self._options.prompt_tokens)
        return loop.run(batch, num_tokens, self._options.prompt_tokens), loop.ms_per_step


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,4,8,16,32")
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--draft-ms", type=float, default=1.0, help="from request to reply")
    parser.add_argument("--output-tokens", type=int, default=160)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    cuda.prepare()  # as a server with a model of ours
    cuda.leave_out_graphs()
    loaded = random_model(options.shape, options.dtype)
    engine, info = speculating_engine(loaded)
    engine.count_accepted = Coin(options.acceptance).count
    costs = measure(engine, info)
    info = WorkerInfo(**{**_struct(info), "step_costs": costs})
    arms = Arms(engine, info, options)
    rows = []
    for batch in map(int, options.batches.split(",")):
        rows.append(arms.row(batch, {c.width: c.seconds for c in costs if c.batch == batch}))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, file=sys.stderr, flush=True)
        engine.reset()
    result = {
        **provenance("synthetic"), "acceptance": options.acceptance, "draft_ms": options.draft_ms, "rows": rows,
        "step_costs": [_struct_cost(c) for c in costs],
    }  # fmt: skip
    if options.json:
        write_json(options.json, result)
    print_last_line(result)
    return 0


def _expected(chance: float, k: int) -> float:
    return sum(chance**j for j in range(k + 1))


def _struct_cost(cost: Any) -> dict[str, Any]:  # noqa: ANN401 - a StepCost
    return {"batch": cost.batch, "width": cost.width, "ms": round(cost.seconds * 1000, 3)}


if __name__ == "__main__":
    sys.exit(main())
