"""One training run: batches, the step, the schedule, validation, checkpoints.

The graph of a step is queued while the one before runs; each step waits for the loss of the step two before it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from bench.training import checkpoint, evaluate
from bench.training.documents import Batches, Documents
from bench.training.losses import LossOptions, surrogate
from bench.training.optimiser import Optimiser, State, cosine
from bench.training.parts import Batch, Params, Trained
from bench.training.target import Target
from workers.arrays import start_evaluating

QUEUED_STEPS = 2

Step = Callable[[Params, State, Batch, float, float], tuple[Params, State, mx.array, mx.array]]


@dataclass(frozen=True)
class RunOptions:
    """A run ends after `seconds` of wall-clock (all its visits together) or `steps`, whichever is given."""

    seconds: float | None = None
    steps: int | None = None
    visit_seconds: float | None = None  # stop this process earlier, to be resumed
    evaluate_every: float = 60.0  # seconds
    evaluate_documents: int = 64
    final_documents: int = 200
    num_draft_tokens: int = 0  # in the reported acceptance; 0: all that are predicted
    is_compiled: bool = True
    is_quiet: bool = False


@dataclass
class Run:
    drafter: Trained
    target: Target
    documents: Documents
    batches: Batches
    optimiser: Optimiser
    loss: LossOptions
    options: RunOptions
    params: Params
    dtype: mx.Dtype
    state: State = field(default_factory=dict)
    number: int = 0
    elapsed_s: float = 0.0
    num_answer_tokens: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.state:
            self.state = self.optimiser.init(self.params)
        self._step = make_step(self.drafter, self.target, self.optimiser, self.loss, self.dtype, self.options)

    @property
    def progress(self) -> float:
        by_steps = self.number / self.options.steps if self.options.steps else 0.0
        by_time = self.elapsed_s / self.options.seconds if self.options.seconds else 0.0
        return max(by_steps, by_time)

    def train(self, checkpoint_path: Path | None = None) -> None:
        """Until the run is over or this visit is; the state is saved in either case."""
        if not self.options.seconds and not self.options.steps:
            raise ValueError("a run needs a number of seconds or of steps")
        before = self.elapsed_s
        began = time.monotonic()
        last_evaluation = self.elapsed_s
        waiting: deque[mx.array] = deque()
        total = self.options.steps or round(self.options.seconds or 0)
        bar = tqdm(total=total, initial=min(total, self._done()), unit="step" if self.options.steps else "s",
                   disable=self.options.is_quiet, mininterval=5)  # fmt: skip
        for batch, num_answer in self.batches:
            self.elapsed_s = before + time.monotonic() - began
            is_visit_over = self.options.visit_seconds and time.monotonic() - began >= self.options.visit_seconds
            if self.progress >= 1 or is_visit_over:
                self.batches.position -= 1
                break
            if self.elapsed_s - last_evaluation >= self.options.evaluate_every:
                self.validate(bar)
                last_evaluation = self.elapsed_s
            self.number += 1
            self.num_answer_tokens += num_answer
            self.params, self.state, loss, _ = self._step(
                self.params, self.state, batch, float(self.number), cosine(self.progress)
            )
            # Starts the step; the wait below is for an older one, so that the device always has work.
            start_evaluating([*self.params.values(), *self.state.values(), loss])
            waiting.append(loss)
            if len(waiting) > QUEUED_STEPS:
                self.losses.append(waiting.popleft().item())  # type: ignore[arg-type]  # a float32 scalar
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", step=self.number, refresh=False)
            bar.update(min(total, self._done()) - bar.n)
        self.losses += [loss.item() for loss in waiting]  # type: ignore[misc]
        mx.eval(self.params, self.state)
        self.elapsed_s = before + time.monotonic() - began
        bar.close()
        if checkpoint_path is not None:
            self.save(checkpoint_path)

    def _done(self) -> int:
        return self.number if self.options.steps else int(self.elapsed_s)

    def validate(self, bar: Any = None) -> None:  # noqa: ANN401 - tqdm has no types for its bar
        """A point of the curve: acceptance on part of the held-out documents."""
        found = self.measure(self.options.evaluate_documents, is_short=True).get("greedy", {})
        point = {
            "step": self.number,
            "seconds": round(self.elapsed_s, 1),
            "answer_tokens": self.num_answer_tokens,
            "loss": sum(self.losses[-50:]) / max(1, len(self.losses[-50:])),
            **found,
        }
        self.curve.append(point)
        if bar is not None and found:
            bar.write(f"{self.drafter.kind} step {self.number} loss {point['loss']:.3f} "
                      f"mean acceptance length {point['mean_acceptance_length']:.3f}")  # fmt: skip

    def measure(self, limit: int, *, is_short: bool = False) -> dict[str, dict[str, object]]:
        draft = evaluate.drafting(self.drafter, self.params, self.target, self.dtype)
        k = self.drafter.num_predictions
        return evaluate.measure(
            draft, self.documents, k, self.options.num_draft_tokens or k, limit, is_short=is_short
        )  # fmt: skip

    def save(self, path: Path) -> None:
        facts = {
            "number": self.number, "elapsed_s": self.elapsed_s, "num_answer_tokens": self.num_answer_tokens,
            "position": self.batches.position, "curve": self.curve, "losses": self.losses[-1000:],
        }  # fmt: skip
        arrays = dict(self.params)
        if self.drafter.tap_scale is not None:
            arrays[TAP_SCALE] = self.drafter.tap_scale
        checkpoint.save(path, arrays, self.state, facts)

    def resume(self, path: Path) -> None:
        self.params, self.state, facts = checkpoint.load(path)
        if TAP_SCALE in self.params:
            self.drafter.tap_scale = self.params.pop(TAP_SCALE)
        self.number, self.elapsed_s = facts["number"], facts["elapsed_s"]
        self.num_answer_tokens, self.batches.position = facts["num_answer_tokens"], facts["position"]
        self.curve, self.losses = facts["curve"], facts["losses"]


TAP_SCALE = "tap_scale"


def make_step(
    drafter: Trained, target: Target, optimiser: Optimiser, loss: LossOptions, dtype: mx.Dtype, options: RunOptions
) -> Step:
    """The whole step as one function of arrays, so that it can be compiled: one graph for each shape of a batch."""
    head = target.head.astype(dtype)

    def objective(params: Params, batch: Batch) -> tuple[mx.array, mx.array]:
        features = drafter.features(target, batch.tokens)
        rows = drafter.forward(params, batch, features, dtype)
        return surrogate(rows, batch, features.final, head, loss)

    differentiate = mx.value_and_grad(objective)

    def advance(
        params: Params, state: State, tokens: mx.array, anchors: mx.array, valid: mx.array, number: mx.array,
        factor: mx.array,
    ) -> tuple[Params, State, mx.array, mx.array]:  # fmt: skip
        (_, cross_entropy), gradients = differentiate(params, Batch(tokens, anchors, valid))
        params, state, norm = optimiser.step(params, gradients, state, number, factor)
        return params, state, cross_entropy, norm

    compiled = mx.compile(advance) if options.is_compiled else advance

    def step(
        params: Params, state: State, batch: Batch, number: float, factor: float
    ) -> tuple[Params, State, mx.array, mx.array]:
        done: tuple[Params, State, mx.array, mx.array] = compiled(
            params, state, batch.tokens, batch.anchors, batch.num_valid, mx.array(number), mx.array(factor)
        )
        return done

    return step


def tap_scale(target: Target, taps: tuple[int, ...], batches: Batches, num_batches: int = 2) -> mx.array:
    """Root mean square of each tap's channels over some batches' tokens, (n * H,) float32; a few channels are huge."""
    total, count = mx.array(0.0), 0
    position = batches.position
    for batch, _ in batches:
        rows, _ = target.forward(batch.tokens)
        is_token = (batch.tokens > 0)[..., None]
        joined = mx.concatenate([rows[t] for t in taps], axis=-1).astype(mx.float32)
        total = total + (mx.square(joined) * is_token).sum(axis=(0, 1))
        count += int(np.array(is_token.sum()))
        mx.eval(total)
        num_batches -= 1
        if not num_batches:
            break
    batches.position = position
    return mx.sqrt(total / max(count, 1) + 1e-6)
