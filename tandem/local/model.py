"""A model loaded into this process."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

from frontend import model_side, tokenizer
from frontend.cache_api import described
from frontend.generation import Generation
from frontend.service import Service
from shared import model_files
from shared.config import Settings
from shared.errors import InvalidRequest, Unavailable
from shared.messages import Message, WorkerInfo
from tandem.local.engine import LocalEngine
from tandem.local.loop import LoopClosed, LoopThread
from tandem.local.request import Prompt, prepare, prompts_of
from tandem.local.stream import PieceStream
from tandem.results import Result, joined
from workers import blas

log = logging.getLogger("tandem")


class LocalModel:
    """Made by `load`. One thread of its own computes; its methods may be called from any thread, several at once:
    whatever runs at one time shares its steps, as a server's requests do.

    Use it as a context manager, or close it; a program's end closes it too.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = LoopThread("tandem")
        self._close = weakref.finalize(self, _close, self._loop, [])
        try:
            self._service, self._engine = self._loop.call(self._load())
        except BaseException:
            self._loop.close()
            raise
        self._close.detach()
        self._close = weakref.finalize(self, _close, self._loop, [self._engine])

    async def _load(self) -> tuple[Service, LocalEngine]:
        """On the model's thread, which is the only one to use MLX."""
        settings = self._settings
        _prepare_machine(settings)
        files = model_files.resolve(settings.model, settings)
        engine = LocalEngine(lambda on_message: _build(files, settings, on_message))
        side = model_side.load(settings)
        await engine.start()
        return Service(settings, side, engine), engine

    # ------------------------------------------------ what it is

    @property
    def name(self) -> str:
        return self._service.model_name

    @property
    def info(self) -> WorkerInfo:
        """What the target told when it was ready: architecture, dtype, device, context length, slots.

        Raises:
            Unavailable: the model was closed.
        """
        return self._engine.require_target()

    @property
    def drafter(self) -> str | None:
        """Where drafts come from: a drafter's kind, "ngram" (out of the text itself) or None."""
        status = self._engine.status
        kind = status.drafter_info.draft_kind if status is not None and status.drafter_info is not None else None
        return kind or ("ngram" if self._settings.is_ngram else None)

    @property
    def modalities(self) -> list[str]:
        """What a prompt may hold: "text", and perhaps "image", "video", "audio"."""
        return self._service.modalities

    @property
    def has_chat_template(self) -> bool:
        """Whether it can answer messages."""
        return self._service.template is not None

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with what the tokenizer puts before and after one."""
        return tokenizer.encode(self._service.text.tokenizer, text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return tokenizer.decode(self._service.text.tokenizer, token_ids, skip_special_tokens=skip_special_tokens)

    def cache(self, *, clear: bool = False) -> dict[str, object]:
        """State of the prefix cache as GET /v1/cache tells it, emptied before with `clear`."""
        reply = self._call(lambda: self._engine.prefix_cache(clear))
        assert reply is not None, "asked in this process"
        return described(reply)

    # ------------------------------------------------ what it does

    def stream(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> PieceStream:  # noqa: ANN401 - of Options
        """As `tandem.stream_generate`."""
        prompts, _ = prompts_of(prompt)
        if len(prompts) > 1 and any(options.get(name) for name in ("images", "videos", "audio")):
            raise InvalidRequest("images, videos, audio: only with one prompt; several bring theirs as content parts")
        generations = self._call(lambda: self._start(prompts, options))
        return PieceStream(self._loop, self._service, self._engine, generations)

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Result | list[Result]:  # noqa: ANN401
        """As `tandem.generate`."""
        prompts, is_several = prompts_of(prompt)
        with self.stream(prompt, **options) as stream:
            pieces = list(stream)
        results = [joined([piece for piece in pieces if piece.index == i]) for i in range(len(prompts))]
        return results if is_several else results[0]

    async def _start(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> list[Generation]:
        """All are checked before the first one starts."""
        generations = [await prepare(self._service, prompt, options) for prompt in prompts]
        for generation in generations:
            generation.start()
        return generations

    def _call(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the coroutine gives
        try:
            return self._loop.call(work())
        except LoopClosed as error:
            raise Unavailable("the model was closed") from error

    # ------------------------------------------------ its end

    def close(self) -> None:
        """End what runs and free the model's memory. Calling it again does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(loop: LoopThread, engines: list[LocalEngine]) -> None:
    for engine in engines:
        loop.call(engine.close())
    loop.close()


def _prepare_machine(settings: Settings) -> None:
    if "mlx.core" not in sys.modules:
        log.info("%s", blas.prepare(settings))
    elif sys.platform == "linux" and not blas.is_cuda_used():
        from workers.machine import disable_compile

        disable_compile()
        log.warning("MLX was imported before tandem.load: its products use the BLAS that they began with")


def _build(files: model_files.ModelFiles, settings: Settings, on_message: Callable[[Message], None]) -> Any:  # noqa: ANN401
    """The processes; MLX is imported here and not before."""
    from tandem.local.processes import LocalProcesses
    from workers.build import build_engine, load_target
    from workers.build_drafter import build_drafter

    loaded = load_target(files, settings)
    target = build_engine(files, settings, loaded)
    drafter = build_drafter(settings, loaded) if settings.draft_checkpoint else None
    return LocalProcesses(settings, target, drafter, on_message)
