"""One progress bar for a download from the hub, instead of the hub's three. Import it only where it is used: it takes
the hub's package along."""

from __future__ import annotations

from typing import Any

from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

_BYTES = (
    "huggingface_hub.snapshot_download"  # the hub's name for the bar of bytes on disk; others count files and packets
)


class DownloadBar(hub_tqdm):
    """Shows the bytes of all files; where standard error is no terminal, nothing. `close_all` ends its line."""

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 # passed on
        if options.get("name") == _BYTES:
            options["desc"] = "Downloading"
        else:
            options["disable"] = True
        super().__init__(*args, **options)  # type: ignore[no-untyped-call] # the hub's class has no types there
        _OPEN.append(self)

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Keep ours: the hub's tells how it stores files."""


_OPEN: list[DownloadBar] = []


def close_all() -> None:
    """So that what is printed next stands below the bar."""
    while _OPEN:
        _OPEN.pop().close()
