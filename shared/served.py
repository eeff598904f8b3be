"""Which model is served, where the operator has changed it since the start: a file in the run folder.

The frontend writes it and restarts the other processes, which read it as they start. Until they are ready with it, it
also holds what was served before: whoever finds that the new model does not work writes that back (`go_back`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from shared import config
from shared.config import Settings
from shared.errors import BadConfig, BadModel
from shared.supervise import EXIT_CONFIG, last_exit


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of these names."""

    model: str
    draft_model: str
    draft_kind: str
    draft_block_size: int
    adapters: str = ""
    is_loaded: bool = True

    @classmethod
    def of(cls, settings: Settings) -> Choice:
        return cls(
            model=settings.model,
            draft_model=settings.draft_model,
            draft_kind=settings.draft_kind,
            draft_block_size=settings.draft_block_size,
            adapters=settings.adapters,
        )

    def applied(self, settings: Settings) -> Settings:
        """These settings with this model. A name that was given to the first model is not the next one's."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "is_loaded"}
        name = settings.model_name if self.model == settings.model else ""
        return msgspec.structs.replace(settings, model_name=name, **values)


class Served(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`load_id` grows with every change: a worker that tells it runs what is meant here."""

    load_id: int
    choice: Choice
    previous: Choice | None = None  # while it is not certain that the choice works
    failed_role: str = ""  # who went back to this choice, and why
    error: str = ""

    def back(self, role: str, error: str) -> Served:
        assert self.previous is not None, "there is something to go back to"
        return Served(load_id=self.load_id + 1, choice=self.previous, failed_role=role, error=error)


def path(settings: Settings) -> Path:
    return settings.run_folder / "served.json"


def read(settings: Settings) -> Served:
    """Raises BadConfig: the file is not one of ours."""
    try:
        return msgspec.json.decode(path(settings).read_bytes(), type=Served)
    except FileNotFoundError:
        return Served(load_id=0, choice=Choice.of(settings))
    except (OSError, msgspec.MsgspecError) as error:
        raise BadConfig(f"{path(settings)} cannot be read: {error}") from error


def write(settings: Settings, served: Served) -> None:
    temporary = path(settings).with_suffix(f".{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(served))
    temporary.replace(path(settings))


def load() -> tuple[Settings, Served]:
    """The settings of this process. Raises BadConfig."""
    settings = config.load()
    served = read(settings)
    return served.choice.applied(settings), served


def load_for(role: str) -> tuple[Settings, Served]:
    """As `load`, for a worker: where the process before it died of the new model, the old one is taken again."""
    settings, served = load()
    if served.previous is not None and last_exit() not in (None, 0):
        go_back(role, settings, served, f"the {role} died while it loaded {served.choice.model}")
        return load()
    return settings, served


def go_back(role: str, settings: Settings, served: Served, error: str) -> bool:
    """A worker cannot run what is meant by `served`. True: something else is meant now."""
    now = read(settings)
    if now.load_id == served.load_id:
        if now.previous is None:
            return False
        write(settings, now.back(role, error))
    return True


def refused(role: str, settings: Settings, served: Served, error: BadModel) -> int:
    """A worker's last act where it cannot load the model: begin again if there is another one, else its exit code."""
    print(f"{role}: {error}", file=sys.stderr, flush=True)
    if go_back(role, settings, served, error.message):
        os.execv(sys.executable, sys.orig_argv)
    return EXIT_CONFIG
