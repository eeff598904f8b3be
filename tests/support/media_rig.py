"""The real scheduler core and engine with a target that takes images, video or audio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from shared.messages import MediaItem, Step
from tests.support.engine_rig import EngineRig, make_engine
from workers.engine import Engine
from workers.models.base import TextModel

CLASSES = [48, 96, 192]


class Prompt(Protocol):
    """What a family's `hf.Prompt` is."""

    tokens: list[int]
    media: list[MediaItem]


class MediaRig(EngineRig):
    """Its target takes what the model does; `steps` are all it was sent."""

    def __init__(
        self, model: TextModel, engine: Engine | None = None, block_size: int | None = None, **more: object
    ) -> None:
        self.steps: list[Step] = []
        super().__init__(engine or make_engine(model, classes=CLASSES, block_size=block_size), **more)  # type: ignore[arg-type]
        info = self.core.target.info
        assert info is not None, "a target that is ready"
        self.core.target.info = msgspec.structs.replace(info, modalities=getattr(model, "modalities", []))

    def start(self, made: Mapping[str, Prompt], names: Iterable[str], max_tokens: int = 12) -> None:
        for name in names:
            self.submit(name, made[name].tokens, max_tokens, media=made[name].media)

    def work(self) -> bool:
        if self.queue and isinstance(self.queue[0], Step):
            self.steps.append(self.queue[0])
        return super().work()


def alone(model: TextModel, made: Mapping[str, Prompt], max_tokens: int = 12) -> dict[str, list[int]]:
    """What each request gets when it is the only one."""
    found = {}
    for name in made:
        rig = MediaRig(model)
        rig.start(made, [name], max_tokens)
        rig.drain()
        found[name] = rig.tokens(name)
        assert len(found[name]) == max_tokens
    return found
