"""The four processes, each under a supervisor of its own but without honcho: a test may put others in their place."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.server import REPOSITORY, Server

MODULES = {"scheduler": "scheduler", "frontend": "frontend", "target": "workers.target", "drafter": "workers.drafter"}
STOP_S = 20.0


class Apart(Server):
    """Args:
    replaced: role -> the module that runs in place of its own.
    environments: role -> variables that differ from the server's.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        replaced: Mapping[str, str] | None = None,
        environments: Mapping[str, Mapping[str, str]] | None = None,
        **settings: object,
    ) -> None:
        super().__init__(model, folder, **settings)
        self._modules = MODULES | dict(replaced or {})
        self._environments = environments or {}
        self._supervisors: list[subprocess.Popen[bytes]] = []

    def start(self, *, wait: bool = True) -> Apart:
        try:
            with self.log.open("ab") as log:
                for role, module in self._modules.items():
                    command = [sys.executable, "-m", "shared.supervise", role, "--", sys.executable, "-m", module]
                    environment = self.environment | self._environments.get(role, {})
                    self._supervisors.append(
                        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
                    )
            if wait:
                self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def tree(self) -> list[psutil.Process]:
        family = []
        for supervisor in self._supervisors:
            if supervisor.poll() is None:
                top = psutil.Process(supervisor.pid)
                family += [top, *top.children(recursive=True)]
        return family

    def stop(self) -> int:
        """SIGTERM to each; returns the worst exit code."""
        family = self.tree()
        for supervisor in self._supervisors:
            supervisor.send_signal(signal.SIGTERM)
        try:
            return max((abs(supervisor.wait(timeout=STOP_S)) for supervisor in self._supervisors), default=0)
        finally:
            for process in family:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
