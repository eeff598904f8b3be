"""The real scheduler core and engine with a target that takes images, video or audio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import mlx.core as mx
import msgspec

from shared.messages import MediaItem, Step
from tests.support.engine_rig import EngineRig, make_engine
from workers.engine import Engine
from workers.kernels.reference import ReferenceAttention
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

    def interrupt(self, how: Literal["preempted", "target lost"]) -> None:
        """In the middle of whatever runs."""
        if how == "target lost":
            self.lose_target()
        else:
            self.session.preempt(self.core.running[0])
            self._deliver(self.core._finish(self.now))

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


class CountedDecodes(ReferenceAttention):
    """Counts rows of one token, and those of them that it rotates itself."""

    num_decodes = num_rotated = 0

    def attend(self, q: mx.array, *rest: Any) -> mx.array:
        self.num_decodes += q.shape[2] == 1
        self.num_rotated += q.shape[2] == 1 and rest[-1].rotation is not None
        return super().attend(q, *rest)
