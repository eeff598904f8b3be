"""The drafter worker process. `python -m workers.drafter`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

from shared import config, log
from shared.errors import BadConfig
from shared.messages import Draft, DraftReply, DraftRequest, Drain, ToDrafter, Welcome
from shared.supervise import EXIT_CONFIG
from workers.link import Link

logger = logging.getLogger("drafter")


class Drafter:
    """Registers, heartbeats and answers empty drafts."""

    def __init__(self, settings: config.Settings) -> None:
        self.link = Link(settings, "drafter", ToDrafter, dict)
        self.epoch = 0
        self.is_draining = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self.is_draining = True

    def run(self) -> None:
        self.link.start()
        try:
            while not self.is_draining:
                match self.link.receive(1.0):
                    case Welcome() as message:
                        self.epoch = message.epoch
                    case DraftRequest() as message if message.epoch == self.epoch:
                        drafts = [
                            Draft(request_id=r.request_id, anchor=r.start + len(r.token_ids) - 1, token_ids=[])
                            for r in message.rows
                        ]
                        self.link.send(
                            DraftReply(epoch=self.epoch, draft_id=message.draft_id, drafts=drafts, seconds=0.0)
                        )
                    case Drain():
                        self.is_draining = True
        finally:
            self.link.close()


def main() -> int:
    try:
        settings = config.load()
        log.set_up("drafter", settings.log_level)
        config.prepare_run_folder(settings)
    except BadConfig as error:
        print(f"drafter: {error}", file=sys.stderr)
        return EXIT_CONFIG
    drafter = Drafter(settings)
    signal.signal(signal.SIGTERM, drafter.stop)
    signal.signal(signal.SIGINT, drafter.stop)
    drafter.run()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
