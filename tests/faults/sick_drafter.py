"""A drafter that falls ill in the middle of a draft: `python -m tests.faults.sick_drafter`.

SICK_FOLDER is a folder of the test. Where DRAFT.armed lies there, the main loop stops for ever in the next draft, and
the file DRAFT is written; the heartbeat's thread goes on.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from shared.messages import DraftReply, DraftRequest
from tests.faults.sick_target import FOLDER, is_armed, note
from workers import drafter

if TYPE_CHECKING:
    from workers.draft_engine import DraftEngine

DRAFT = "DRAFT"


class SickDrafter(drafter.DrafterProcess):
    def _draft(self, message: DraftRequest, engine: DraftEngine) -> DraftReply:
        folder = Path(os.environ[FOLDER])
        if is_armed(folder, DRAFT):
            note(folder, DRAFT)
            threading.Event().wait()
        return super()._draft(message, engine)


if __name__ == "__main__":
    drafter.DrafterProcess = SickDrafter  # type: ignore[misc]  # main() makes it
    code = drafter.main()
    sys.stderr.flush()
    os._exit(code)
