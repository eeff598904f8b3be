"""The scheduler core alone, with a null worker: seconds that one step costs in Python, without MLX, sockets or HTTP.

A step's cost is `handle(StepResult)`: commit the tokens, hand out outputs, plan the next step. The wire's share (decode
the result, encode step and outputs) is given beside it. `python -m bench.scheduler --running 256 --waiting 10000`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bench import report
from bench.ceiling import concurrencies
from scheduler.core import Core
from scheduler.metrics import Metrics
from shared.config import Settings
from shared.messages import (
    Hello,
    Message,
    Outputs,
    Ready,
    RequestId,
    RowResult,
    SamplingParams,
    Step,
    StepResult,
    Submit,
    ToScheduler,
    Welcome,
    WorkerInfo,
)
from shared.wire import Decoder, encode

FRONTEND = "bench-frontend"
TARGET = "bench-target"
CAPACITY = 4096
VOCAB_SIZE = 49152
NULL_TOKEN = 100


class Bench:
    """A core with a frontend that submits and a target that answers every step at once."""

    def __init__(self, num_slots: int, num_waiting: int, prompt_tokens: int, output_tokens: int) -> None:
        self.core = Core(Settings(max_queue=num_slots + num_waiting + 1, draft_model="none"), Metrics())
        self.now = 0.0  # the core has no clock; each step takes 10 ms of this one
        self.steps: deque[Step] = deque()
        self.num_submitted = 0
        self.prompt = [NULL_TOKEN] * prompt_tokens
        self.output_tokens = output_tokens
        self.decoder = Decoder(ToScheduler)
        self.handle_s: list[float] = []
        self.wire_s: list[float] = []
        self.num_rows: list[int] = []
        self._deliver(self.core.handle(FRONTEND, Hello(role="frontend", instance_id=FRONTEND, pid=1), self.now))
        welcome = self.core.handle(TARGET, Hello(role="target", instance_id=TARGET, pid=2), self.now)
        self.epoch = next(m.epoch for _, m in welcome if isinstance(m, Welcome))
        info = WorkerInfo(
            model="null",
            architecture="null",
            fingerprint="null",
            device="none",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=CAPACITY,
            num_slots=num_slots,
            kv_capacity_tokens=num_slots * CAPACITY,
            capacity_classes=[CAPACITY],
            kv_bytes_per_token=1,
            max_step_tokens=2048,
            eos_token_ids=[2],
        )
        self._deliver(self.core.handle(TARGET, Ready(epoch=self.epoch, info=info), self.now))
        for _ in range(num_slots + num_waiting):
            self.submit()

    def submit(self) -> float:
        """One more request; seconds in the core."""
        request = Submit(
            request_id=RequestId(f"r{self.num_submitted}"),
            prompt_token_ids=self.prompt,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=self.output_tokens,
        )
        self.num_submitted += 1
        start = time.perf_counter()
        out = self.core.handle(FRONTEND, request, self.now)
        elapsed = time.perf_counter() - start
        self._deliver(out)
        return elapsed

    def step(self) -> int:
        """Answer the oldest step. Returns how many requests ended."""
        step = self.steps.popleft()
        sampled = [row.slot for row in (*step.decodes, *step.prefills) if row.is_sampled]
        result = StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            rows=[RowResult(slot=slot, token_ids=[NULL_TOKEN]) for slot in sampled],
            phases={},
        )
        self.now += 0.01
        frame = encode(result)
        start = time.perf_counter()
        message = self.decoder.decode(frame)
        decoded = time.perf_counter()
        out = self.core.handle(TARGET, message, self.now)
        handled = time.perf_counter()
        for _, answer in out:
            encode(answer)
        end = time.perf_counter()
        self.handle_s.append(handled - decoded)
        self.wire_s.append(decoded - start + end - handled)
        self.num_rows.append(len(sampled))
        return self._deliver(out)

    def _deliver(self, envelopes: Sequence[tuple[str, Message]]) -> int:
        num_ended = 0
        for _, message in envelopes:
            if isinstance(message, Step):
                self.steps.append(message)
            elif isinstance(message, Outputs):
                num_ended += sum(output.finish_reason is not None for output in message.outputs)
        return num_ended

    def forget(self) -> None:
        """Drop the figures so far."""
        self.handle_s, self.wire_s, self.num_rows = [], [], []


def measure(num_running: int, num_waiting: int, num_steps: int, prompt_tokens: int, *, churn: bool) -> dict[str, Any]:
    """Figures of `num_steps` steps after every slot decodes.

    Args:
        churn: requests end after 64 tokens and are replaced; otherwise none ends while it is measured.
    """
    num_warm = 2 * num_running * prompt_tokens // 2048 + 64
    output_tokens = 64 if churn else min(CAPACITY - prompt_tokens, num_warm + num_steps + 64)
    bench = Bench(num_running, num_waiting, prompt_tokens, output_tokens)
    submit_s: list[float] = []

    def step() -> None:
        num_ended = bench.step()
        submit_s.extend(bench.submit() for _ in range(num_ended if churn else 0))

    for _ in range(num_warm):
        step()
    bench.forget()
    submit_s.clear()
    for _ in tqdm(range(num_steps), desc=f"{num_running}+{num_waiting}", file=sys.stderr, disable=None, leave=False):
        step()
    bench.core.check_integrity()
    return {
        "num_running": num_running,
        "num_waiting": num_waiting,
        "has_churn": churn,
        "rows_per_step": sum(bench.num_rows) / len(bench.num_rows),
        "handle_s": report.spread(bench.handle_s),
        "wire_s": report.spread(bench.wire_s),
        "submit_s": report.spread(submit_s),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler", description=__doc__)
    parser.add_argument("--running", type=concurrencies, default=[1, 8, 32, 256], help="as 8,256")
    parser.add_argument("--waiting", type=int, default=10_000, help="queue length of the second round of cases")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    runs = []
    for num_waiting in dict.fromkeys([0, args.waiting]):
        for num_running in args.running:
            runs += [
                measure(num_running, num_waiting, args.steps, args.prompt_tokens, churn=churn)
                for churn in (False, True)
            ]
    rows = [
        [
            f"{r['num_running']} + {r['num_waiting']}{' churn' if r['has_churn'] else ''}",
            f"{r['rows_per_step']:.1f}",
            *(report.seconds(r["handle_s"][p]) for p in ("min", "p50", "p90", "p99")),
            report.seconds(r["wire_s"]["p50"]),
            report.seconds(r["submit_s"]["p50"] if r["submit_s"] else None),
        ]
        for r in runs
    ]
    header = ["running + waiting", "rows", "step min", "step p50", "step p90", "step p99", "wire p50", "submit p50"]
    print(report.table(header, rows))
    result = report.provenance("scheduler") | {"num_steps": args.steps, "runs": runs}
    report.finish(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
