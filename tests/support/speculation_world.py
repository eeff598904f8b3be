"""A clock model of a target and a drafter around the real scheduler core: no MLX, no process, no waiting.

Plain decoding is pipelined: two steps are at the target, so that sending and planning hide behind the device. With
drafts a round is serial: draft, verify, result. All times are of the model's own clock; a run is the same each time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.core import Core
from scheduler.learned import Learned
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope
from shared.config import Settings
from shared.messages import (
    Cancel,
    Draft,
    DraftReply,
    DraftRequest,
    Hello,
    Message,
    Outputs,
    Ready,
    RequestId,
    RowResult,
    SamplingParams,
    Step,
    StepCost,
    StepResult,
    Submit,
    Welcome,
)
from tests.support.fake_target import worker_info

GREEDY = SamplingParams(temperature=0.0)
CALIBRATED = tuple(itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)))  # batch, width
MAX_K = 7
TOKEN = 5


@dataclass(frozen=True)
class Costs:
    """Args:
    step_s: seconds that the device takes for (batch, width).
    draft_s: seconds of the drafter for (batch, k).
    acceptance: chance that a draft is accepted once those before it were.
    send_s: from one process to another.
    host_s: to build and read a step; hidden while another one runs.
    calibration: factor of the costs that the target tells at start: shorter contexts, another load.
    noise: standard deviation of a duration's logarithm; one in fifty takes three times as long.
    """

    step_s: Callable[[int, int], float]
    draft_s: Callable[[int, int], float]
    acceptance: float
    send_s: float = 0.0002
    host_s: float = 0.0005
    calibration: Callable[[int, int], float] = lambda batch, width: 1.0
    noise: float = 0.08

    def expected(self, k: int) -> float:
        return sum(self.acceptance**j for j in range(k + 1))

    def rate(self, batch: int, k: int) -> float:
        """Tokens per second of an endless run with this k: what noise-free time and luck give."""
        outliers = 1 + 0.02 * 2
        scale = outliers * math.exp(self.noise**2 / 2)
        if k == 0:
            return batch / max(scale * self.step_s(batch, 1), self.host_s)
        round_s = scale * (self.step_s(batch, k + 1) + self.draft_s(batch, k)) + self.host_s + 4 * self.send_s
        return batch * self.expected(k) / round_s

    def allowed(self, batch: int, k: int) -> float:
        """As `rate`, with nothing but verify and draft: what no scheduler can beat."""
        scale = (1 + 0.02 * 2) * math.exp(self.noise**2 / 2)
        return batch * self.expected(k) / (scale * (self.step_s(batch, k + 1) + self.draft_s(batch, k)))


@dataclass(frozen=True)
class Traffic:
    """Requests that end and are followed by others.

    Args:
        output_tokens: the mean; a request's own is between half of it and one and a half.
        prefill_s: seconds that so many prompt tokens add to a step.
        catch_up_s: seconds that so many tokens which the drafter has not seen add to its turn.
    """

    prompt_tokens: int
    output_tokens: int
    prefill_s: Callable[[int], float]
    catch_up_s: Callable[[int], float]


@dataclass
class World:
    """The core, a target and a drafter that take their time. `k` None leaves it to the policy."""

    costs: Costs
    k: int | None = None
    seed: int = 1
    traffic: Traffic | None = None  # None: requests never end
    disturbed_until: float = 0.0  # until then everything takes up to four times as long
    known: dict[str, Learned] = field(default_factory=dict)  # what the core begins with
    num_tokens: int = 0
    now: float = 100.0
    _events: list[tuple[float, int, str, Message]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _steps: list[tuple[float, Step]] = field(default_factory=list)  # when each came, in order
    _device_free: float = 0.0
    _drafter_free: float = 0.0
    _num_requests: int = 0
    _outliers: list[float] = field(default_factory=list)
    _running: list[str] = field(default_factory=list)
    _epochs: dict[str, int] = field(default_factory=dict)
    _host_free: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.core = Core(Settings(draft_model="none", max_queue=4096), Metrics(), known=self.known)
        self.core.speculator.forced_k = self.k
        told = [
            StepCost(
                batch=b, width=w, seconds=(self.costs.step_s(b, w) + self.costs.host_s) * self.costs.calibration(b, w)
            )
            for b, w in CALIBRATED
        ]
        info = worker_info(
            vocab_size=100, max_model_len=1 << 20, num_slots=64, kv_capacity_tokens=1 << 26,
            capacity_classes=[1 << 20], max_step_tokens=4096, max_draft_tokens=31, step_costs=told,
            queues_steps=True,
        )  # fmt: skip
        self._handle("front", Hello(role="frontend", instance_id="front", pid=1))
        self._handle("target", Hello(role="target", instance_id="target", pid=2))
        self._handle("target", Ready(epoch=self._epochs["target"], info=info))
        self._handle("drafter", Hello(role="drafter", instance_id="drafter", pid=3))
        ready = worker_info(draft_kind="model", max_draft_tokens=MAX_K)
        self._handle("drafter", Ready(epoch=self._epochs["drafter"], info=ready))

    # ------------------------------------------------ what a test does

    def set_batch(self, batch: int) -> None:
        """Have so many requests running from now on."""
        while len(self._running) > batch:
            self._handle("front", Cancel(request_id=RequestId(self._running.pop(0))))
        while len(self._running) < batch:
            self._num_requests += 1
            self._running.append(f"r{self._num_requests}")
            prompt, most = 8, 1 << 19
            if self.traffic is not None:
                mean = self.traffic.output_tokens
                prompt, most = self.traffic.prompt_tokens, self.random.randint(mean // 2, mean + mean // 2)
            submit = Submit(
                request_id=RequestId(self._running[-1]), prompt_token_ids=[1] * prompt, sampling=GREEDY, max_tokens=most
            )
            self._handle("front", submit)

    def run(self, seconds: float) -> float:
        """Let so much time pass; tokens per second in it."""
        until, before, started = self.now + seconds, self.num_tokens, self.now
        while self.now < until:
            self._advance()
        return (self.num_tokens - before) / (self.now - started)

    # ------------------------------------------------ the clock

    def _advance(self) -> None:
        deadline = self.core.deadline
        if deadline is not None and (not self._events or deadline < self._events[0][0]):
            self.now = max(self.now, deadline)
            self._deliver(self.core.wake(self.now))
            return
        at, _, sender, message = heapq.heappop(self._events)
        self.now = max(self.now, at)
        self._handle(sender, message)

    def _handle(self, sender: str, message: Message) -> None:
        self._deliver(self.core.handle(sender, message, self.now))

    def _at(self, when: float, sender: str, message: Message) -> None:
        heapq.heappush(self._events, (when, next(self._order), sender, message))

    def _deliver(self, envelopes: list[Envelope]) -> None:
        for receiver, message in envelopes:
            match message:
                case Welcome():
                    self._epochs[receiver] = message.epoch
                case Step():
                    self._step(message)
                case DraftRequest():
                    self._draft(message)
                case Outputs():
                    ended = {output.request_id for output in message.outputs if output.finish_reason is not None}
                    batch = len(self._running)
                    self._running = [name for name in self._running if name not in ended]
                    if self.traffic is not None:
                        self.set_batch(batch)

    def _noisy(self, seconds: float) -> float:
        if not self._outliers:  # one in each lot of fifty, so that its number is no matter of luck
            self._outliers = [3.0, *[1.0] * 49]
            self.random.shuffle(self._outliers)
        if self.now < self.disturbed_until:
            seconds *= self.random.uniform(1.0, 4.0)
        return seconds * self._outliers.pop() * math.exp(self.random.gauss(0.0, self.costs.noise))

    def _step(self, step: Step) -> None:
        """It runs once it is built and the one before it is done; building hides behind that one."""
        width = max((1 if r.token_ids is None else len(r.token_ids) for r in step.decodes), default=1)
        built = self._host_free = max(self.now + self.costs.send_s, self._host_free) + self.costs.host_s
        device_s = self._noisy(self.costs.step_s(max(1, len(step.decodes)), width))
        prompts = sum(len(row.token_ids or []) for row in step.prefills)
        if prompts and self.traffic is not None:
            device_s += self.traffic.prefill_s(prompts)
        self._device_free = max(built, self._device_free) + device_s
        # The one behind it is made ready before this one is waited for.
        phases = {"build": self.costs.host_s, "device": max(0.0, self._device_free - built - self.costs.host_s)}
        rows = [self._row(r.slot, r.num_drafts) for r in (*step.decodes, *step.prefills) if r.is_sampled]
        self.num_tokens += sum(len(r.token_ids) for r in rows)
        result = StepResult(epoch=step.epoch, step_id=step.step_id, rows=rows, phases=phases)
        self._at(self._device_free + self.costs.send_s, "target", result)

    def _row(self, slot: int, num_drafts: int) -> RowResult:
        n = 0
        while n < num_drafts and self.random.random() < self.costs.acceptance:
            n += 1
        return RowResult(slot=slot, token_ids=[TOKEN] * (n + 1))

    def _draft(self, request: DraftRequest) -> None:
        k = max(row.num_tokens for row in request.rows)
        started = max(self.now + self.costs.send_s, self._drafter_free)
        self._drafter_free = started + (self._noisy(self.costs.draft_s(len(request.rows), k)) if k else 0.0)
        unseen = sum(len(row.token_ids) for row in request.rows if len(row.token_ids) > 2 * MAX_K)
        if unseen and self.traffic is not None:
            self._drafter_free += self.traffic.catch_up_s(unseen)
        drafts = [
            Draft(
                request_id=r.request_id,
                anchor=r.start + len(r.token_ids) - 1,
                token_ids=[TOKEN] * r.num_tokens,
            )
            for r in request.rows
        ]
        reply = DraftReply(epoch=request.epoch, draft_id=request.draft_id, drafts=drafts, seconds=0.0)
        self._at(self._drafter_free + self.costs.send_s, "drafter", reply)
