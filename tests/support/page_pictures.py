"""Pictures of the chat page for the documents: python -m tests.support.page_pictures FOLDER [MODEL]

They show a real server with the embedded model (or MODEL) and drafts out of text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.support.browser import Visit, chromium
from tests.support.server import Server

QUESTIONS = (
    "List five fruits, one on each line.",
    "Repeat that list, and then repeat it once more.",
)
SETTINGS = {"temperature": "0", "max_tokens": "160"}


def main(folder: Path, model: str = "default") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Server(model, Path(scratch), max_num_seqs=2, draft_tokens=4) as server,
        chromium() as browser,
        Visit(browser, width=1180, height=820) as visit,
    ):
        page = visit.page
        page.goto(f"{server.url}/ui")
        page.wait_for_selector("#model-state[data-state=ready]")
        page.screenshot(path=str(folder / "welcome.png"))
        page.click("#open-settings")
        for name, value in SETTINGS.items():
            page.fill(f"[name={name}]", value)
        page.keyboard.press("Escape")
        for number, question in enumerate(QUESTIONS, start=1):
            page.fill("#prompt", question)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "n => document.querySelectorAll('.assistant:not(.streaming)').length == n", arg=number, timeout=120_000
            )
        page.screenshot(path=str(folder / "chat.png"))
        page.click("#view-tokens")
        page.screenshot(path=str(folder / "chat-page.png"))
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=str(folder / "tokens-dark.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
