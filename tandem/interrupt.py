"""Ctrl-C while the hub downloads: its threads would read on until they are done, which can take as long as the model is
large."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shared.config import Settings
from shared.model_files import ModelFiles, resolve
from shared.shipped_drafters import resolve_drafter

EXIT_INTERRUPTED = 128 + signal.SIGINT


def fetch(model: str, settings: Settings) -> ModelFiles:
    """`resolve`, for a command that Ctrl-C ends at once. What was downloaded so far is used by the next try.

    Raises:
        BadModel: as `resolve` says.
    """
    if model in ("", "default"):
        return resolve(model, settings)  # by pip, which ends by itself and leaves a folder to tidy up
    with _ends_at_once():
        return resolve(model, settings)


def fetch_drafter(settings: Settings) -> ModelFiles:
    """`resolve_drafter`, in the same way.

    Raises:
        BadModel: as `resolve_drafter` says.
    """
    with _ends_at_once():
        return resolve_drafter(settings)


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """The process leaves without waiting for its threads, which hold nothing but partial files."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        print(file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
