"""Loading another model, or none, while HTTP goes on: `POST /v1/models/load` and `/unload`.

A new model is checked as far as its files tell before anything is stopped. Then nobody new is let in, those inside may
finish, the engine's processes are restarted, and the tokenizer changes once they are ready. Where they do not become
ready with it, whoever finds out writes the choice before it back (`shared/served.py`) and this follows.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING

import msgspec

from frontend import model_side
from frontend.engine import RETRY_AFTER_S
from frontend.model_side import ModelSide
from shared import adapters as adapter_names
from shared import served as served_model
from shared.errors import BadConfig, BadModel, EngineFailure, InvalidRequest, TandemError, Unavailable
from shared.served import Choice, Served
from shared.supervisors import has_child, tell

if TYPE_CHECKING:
    from frontend.service import Service

log = logging.getLogger("frontend")

LOADING = "loading"
UNLOADED = "unloaded"
LOOK_S = 0.05
LOAD_LIMIT_S = 3600.0  # a model that is not ready by then is given up
LAST_WORDS_S = 2.0  # for answers that are ended to be written to their ends
LOADING_RETRY_S = 5.0


class ModelChange:
    """One at a time.

    Args:
        service: gets the new model's side.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._settings = service.first_settings
        self._task: asyncio.Task[None] | None = None
        self.state = ""  # "checking", "draining", "loading", "going back", "done", "failed"
        self.model = ""
        self.error = ""

    def described(self) -> dict[str, str] | None:
        """For /health; None: the model was never changed."""
        if not self.state:
            return None
        return {"state": self.state, "model": self.model, **({"error": self.error} if self.error else {})}

    def resume(self) -> None:
        """Called once as the server starts: take up what a frontend before this one left."""
        served = served_model.read(self._settings)
        if served.previous is not None or served.error:
            self._shut_for_loading()
            self._begin(served.choice.model, self._continue(served))
        elif not served.choice.is_loaded:
            self._shut_unloaded()

    # ------------------------------------------------------------ what the operator asks for

    def load(self, model: str, draft_model: str | None, adapters: Mapping[str, str] | None) -> asyncio.Task[None]:
        """Args:
            adapters: name -> place; None: those that are served now, where the model stays.
        Raises:
            InvalidRequest: the adapters' names or places cannot be used.
            Unavailable: the model is being changed already, or the server ends.
        """
        now, first = served_model.read(self._settings).choice, self._settings
        known = now if model == now.model else Choice.of(first) if model == first.model else None
        if draft_model is not None:
            kept = known.adapters if known is not None else ""
            choice = Choice(model=model, draft_model=draft_model, draft_kind="", draft_block_size=0, adapters=kept)
        elif known is not None:
            choice = msgspec.structs.replace(known, is_loaded=True)
        else:  # a drafter's checkpoint is made for one model
            draft = "auto" if first.draft_checkpoint else first.draft_model
            choice = Choice(model=model, draft_model=draft, draft_kind="", draft_block_size=0)
        if adapters is not None:
            choice = msgspec.structs.replace(choice, adapters=_setting_of(adapters))
        self._check_free()
        return self._begin(model, self._load(choice))

    def unload(self) -> asyncio.Task[None]:
        """Raises Unavailable: the model is being changed already, or the server ends."""
        self._check_free()
        return self._begin(self._service.model_name, self._unload())

    def _check_free(self) -> None:
        if self._task is not None and not self._task.done():
            raise Unavailable("the model is being changed already", retry_after_s=LOADING_RETRY_S)
        if self._service.door.is_final:
            self._service.door.check()

    def _begin(self, model: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        self.model, self.error = model, ""
        self._task = asyncio.create_task(self._told(work), name="model change")
        return self._task

    async def _told(self, work: Coroutine[None, None, None]) -> None:
        """Run it; how it ends is told in /health, and to who waits for it."""
        try:
            await work
        except TandemError as error:
            self.state, self.error = "failed", error.message
            log.error("%s: %s", self.model, error.message)
            raise
        except Exception as error:
            self.state, self.error = "failed", f"internal error ({type(error).__name__})"
            raise
        self.state = "done"

    # ------------------------------------------------------------ how

    async def _load(self, choice: Choice) -> None:
        """Raises:
        InvalidRequest: the model cannot be loaded as far as its files tell; nothing was stopped.
        EngineFailure: it turned out that it cannot be loaded; the one before is served again.
        """
        self.state = "checking"
        side = await self._checked(choice)
        self._shut_for_loading()
        await self._empty()
        before = served_model.read(self._settings)
        served = Served(load_id=before.load_id + 1, choice=choice, previous=before.choice)
        served_model.write(self._settings, served)
        self._restart(is_other=side.model_name != self._service.model_name)
        await self._until_ready(served, side)

    async def _unload(self) -> None:
        before = served_model.read(self._settings)
        if not before.choice.is_loaded:
            return
        self._shut_unloaded()
        await self._empty()
        choice = msgspec.structs.replace(before.choice, is_loaded=False)
        served_model.write(self._settings, Served(load_id=before.load_id + 1, choice=choice))
        await self._stop_workers()

    async def _checked(self, choice: Choice) -> ModelSide:
        """Raises InvalidRequest."""
        words = [choice.model, choice.draft_model, choice.draft_kind, choice.adapters]
        command = [sys.executable, "-m", "workers.check", *words]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            _, told = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            reason = told.decode("utf-8", "replace").strip().rpartition("\n")[2] or f"exit code {process.returncode}"
            raise InvalidRequest(f"model: {choice.model!r} cannot be loaded: {reason}", param="model")
        try:
            return await asyncio.to_thread(model_side.load, choice.applied(self._settings))
        except (BadConfig, BadModel) as error:
            raise InvalidRequest(f"model: {choice.model!r}: {error.message}", param="model") from error

    async def _empty(self) -> None:
        """Those inside may finish; what is left then ends with a clear error, since another model would go on wrong."""
        self.state = "draining"
        if not await self._service.door.wait_empty(self._settings.drain_timeout_s):
            error = Unavailable("the model is being changed", retry_after_s=LOADING_RETRY_S)
            self._service.engine.fail_all(error)
            await self._service.door.wait_empty(LAST_WORDS_S)

    def _restart(self, is_other: bool) -> None:
        """Args:
        is_other: the scheduler's series carry the model's name, so it starts again too.
        """
        for role in ("scheduler", "target", "drafter") if is_other else ("target", "drafter"):
            tell(role, signal.SIGHUP, self._settings)

    async def _stop_workers(self) -> None:
        """Until the processes have ended; supervisors kill what does not end by itself."""
        told = [tell(role, signal.SIGUSR2, self._settings) for role in ("target", "drafter")]
        while any(has_child(supervisor) for supervisor in told):
            await asyncio.sleep(LOOK_S)

    async def _continue(self, served: Served) -> None:
        """After a restart of the frontend in the middle of a change."""
        if served.error:
            await self._follow_back(served)
            raise EngineFailure(served.error)
        await self._until_ready(served, await asyncio.to_thread(model_side.load, served.choice.applied(self._settings)))

    async def _until_ready(self, served: Served, side: ModelSide) -> None:
        """Raises EngineFailure: somebody went back."""
        self.state = "loading"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LOAD_LIMIT_S
        while not self._is_ready(served):
            now = served_model.read(self._settings)
            if now.load_id == served.load_id and loop.time() > deadline:
                now = served.back("frontend", f"it was not ready within {LOAD_LIMIT_S:.0f} s")
                served_model.write(self._settings, now)
            if now.load_id != served.load_id:
                self.state = "going back"
                await self._follow_back(now)
                raise EngineFailure(f"{served.choice.model!r} could not be loaded: {now.error}")
            await asyncio.sleep(LOOK_S)
        served_model.write(self._settings, Served(load_id=served.load_id, choice=served.choice))
        self._service.adopt(side)
        self._service.door.open()
        log.info("serving %s", side.model_name)

    async def _follow_back(self, served: Served) -> None:
        """Have all processes serve what was served before, which the one that failed does already."""
        if not served.choice.is_loaded:
            self._shut_unloaded()
            await self._stop_workers()
        else:
            for role in {"scheduler", "target", "drafter"} - {served.failed_role}:
                tell(role, signal.SIGHUP, self._settings)
            while not self._is_ready(served):
                await asyncio.sleep(LOOK_S)
            self._service.door.open()
        served_model.write(self._settings, Served(load_id=served.load_id, choice=served.choice))

    def _is_ready(self, served: Served) -> bool:
        """Whether the target, and the drafter where there is one, run what is meant."""
        status = self._service.engine.status
        if status is None or self._service.engine.is_silent:
            return False
        infos = [status.target_info if status.target == "ready" else None]
        if served.choice.applied(self._settings).draft_checkpoint:
            infos.append(status.drafter_info if status.drafter == "ready" else None)
        return all(info is not None and info.load_id == served.load_id for info in infos)

    # ------------------------------------------------------------ the door

    def _shut_for_loading(self) -> None:
        self._service.door.shut(LOADING, "a model is being loaded", LOADING_RETRY_S)

    def _shut_unloaded(self) -> None:
        self._service.door.shut(UNLOADED, "no model is loaded: POST /v1/models/load brings one", 10 * RETRY_AFTER_S)


def _setting_of(adapters: Mapping[str, str]) -> str:
    """Raises InvalidRequest."""
    try:
        return adapter_names.to_setting(adapters)
    except BadConfig as error:
        raise InvalidRequest(error.message, param="adapters") from error
