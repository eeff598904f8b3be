"""The servers of the drafter benchmark: one for each arm, started here, or found under a URL.

`Servers` hands out the one that is needed. With `keep_alive` all run until the end (a machine with memory for them;
idle ones cost nothing), otherwise one is stopped before the next starts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import msgspec

from bench.load import Target
from bench.peers import ARMS, serving
from tandem.draft_counters import DraftCounters, parse

PLAIN, NULL = "none", "null"
DRAFTER_READY_S = 180.0
KEPT_KV_BYTES = 2 << 30  # where several servers share a device, for each, unless TANDEM_KV_CACHE_BYTES says otherwise
POLL_S = 0.1
TANDEM = ARMS[0]


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared. `draft_model` as TANDEM_DRAFT_MODEL; `url`: a server that runs already."""

    name: str
    draft_model: str = ""
    draft_tokens: int = 0  # in every step, whatever it costs; 0: as many as pay
    url: str = ""


def parse_arms(text: str) -> list[Arm]:
    """ "none,null,ngram,dflash,mine=/a/folder@7" -> arms.

    `null` is a second server without a drafter; what it differs from the first is noise. A name without `=` is a draft
    model itself (`ngram`, or a shipped drafter); `@k` drafts k tokens in every step, to see acceptance everywhere.

    Raises:
        ValueError: a name twice, or a number of tokens that is none.
    """
    arms = []
    for part in text.split(","):
        name, _, model = part.partition("=")
        model, _, tokens = (model or name).partition("@")
        name = name.partition("@")[0]
        if not name or not model:
            raise ValueError(f"arm {part!r} is not NAME or NAME=CHECKPOINT")
        if name in (PLAIN, NULL):
            model = PLAIN
        arms.append(Arm(name=name, draft_model=model, draft_tokens=int(tokens or 0)))
    _check_names(arms)
    return arms


def parse_urls(values: Sequence[str]) -> list[Arm]:
    """ "none=http://...", "fast=http://..." or one URL alone.

    Raises:
        ValueError: no URL, or a name twice.
    """
    arms = []
    for value in values:
        name, _, url = value.partition("=") if not value.startswith("http") else ("server", "", value)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is not NAME=URL")
        arms.append(Arm(name=name, url=url.rstrip("/").removesuffix("/v1")))
    _check_names(arms)
    return arms


def _check_names(arms: Sequence[Arm]) -> None:
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"two arms with the same name among {', '.join(names)}")


class Running(msgspec.Struct, frozen=True):
    """A server that is ready."""

    arm: Arm
    target: Target
    health: dict[str, Any]  # of its start; empty where the server has none

    def counters(self) -> dict[str, DraftCounters]:
        """Of each drafter. Raises httpx.HTTPError: no metrics page."""
        page = httpx.get(self.target.url + "/metrics", timeout=30, trust_env=False, headers=self.target.headers)
        page.raise_for_status()
        return parse(page.text)


class Servers:
    """Args:
    model: as TANDEM_MODEL.
    base: what every target has in common (API key, model's name); its URL is not used.
    environment: further settings of the servers that are started.
    log: takes their output.
    """

    def __init__(
        self, model: str, base: Target, environment: Mapping[str, str], keep_alive: bool, log: IO[bytes]
    ) -> None:
        self._model = model
        self._base = base
        self._environment = dict(environment)
        self._keep_alive = keep_alive
        self._log = log
        self._running: dict[str, tuple[Running, ExitStack]] = {}
        self.num_starts = 0

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        while self._running:
            _, (_, stack) = self._running.popitem()
            stack.close()

    def start_all(self, arms: Sequence[Arm]) -> dict[str, str]:
        """With `keep_alive`: first one that drafts, alone, since it measures step costs that the others find in the
        cache folder; then the others together.

        Returns:
            Name -> reason of those that did not become ready.
        """
        if not self._keep_alive:
            return {}
        failed: dict[str, str] = {}

        def start(arm: Arm) -> None:
            try:
                self.get(arm)
            except (RuntimeError, httpx.HTTPError) as error:
                failed[arm.name] = f"{type(error).__name__}: {error}"[:300]

        first = next((arm for arm in arms if arm.draft_model != PLAIN), arms[0])
        start(first)
        with ThreadPoolExecutor(len(arms)) as pool:
            list(pool.map(start, [arm for arm in arms if arm is not first]))
        return failed

    def get(self, arm: Arm) -> Running:
        """The server of this arm, started if it does not run.

        Raises:
            RuntimeError: it ended or was not ready in time; the log says why.
        """
        if arm.name not in self._running:
            if not self._keep_alive:
                self.stop()
            stack = ExitStack()
            try:
                self._running[arm.name] = self._open(arm, stack), stack
            except BaseException:
                stack.close()
                raise
        return self._running[arm.name][0]

    def _open(self, arm: Arm, stack: ExitStack) -> Running:
        if arm.url:
            return Running(arm, msgspec.structs.replace(self._base, url=arm.url), _health(arm.url))
        self.num_starts += 1
        target = stack.enter_context(self._serving(arm))
        deadline = time.monotonic() + DRAFTER_READY_S
        health = _health(target.url)
        while health.get("drafter") != "ready":  # so it says without a drafter too
            if time.monotonic() > deadline:
                raise RuntimeError(f"{arm.name}: the drafter was not ready within {DRAFTER_READY_S:.0f} s")
            time.sleep(POLL_S)
            health = _health(target.url)
        return Running(arm, msgspec.structs.replace(self._base, url=target.url, model=target.model), health)

    def _serving(self, arm: Arm) -> AbstractContextManager[Target]:
        extra = {"TANDEM_DRAFT_MODEL": arm.draft_model, "TANDEM_DRAFT_TOKENS": str(arm.draft_tokens)}
        if self._keep_alive:
            extra["TANDEM_KV_CACHE_BYTES"] = str(KEPT_KV_BYTES)
        return serving(TANDEM, Path(sys.executable), Path(self._model), extra | self._environment, self._log)


def _health(url: str) -> dict[str, Any]:
    try:
        found = httpx.get(url + "/health", timeout=10, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
