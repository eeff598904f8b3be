"""Local files that requests point to: only regular files under the folders that the operator allows."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from shared.errors import InvalidRequest


def read_file(path: str, roots: Sequence[Path], max_bytes: int, param: str | None = None) -> bytes:
    """The bytes of a file under one of `roots`. Symbolic links are followed first; where they lead is what counts.

    Every refusal says the same, so that it does not tell which files exist.

    Raises:
        InvalidRequest: the file is outside, is no regular file, cannot be read or is larger than `max_bytes`.
    """
    refused = InvalidRequest("local files may be read from the server's allowed folders only", param=param)
    if "\0" in path or not os.path.isabs(path):
        raise refused
    try:
        resolved = Path(path).resolve(strict=True)
        root = next((r for r in (r.resolve() for r in roots) if resolved.is_relative_to(r) and resolved != r), None)
        if root is None:
            raise refused
        descriptor = _open_below(root, resolved.relative_to(root).parts)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        raise refused from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise refused
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    if status.st_size > max_bytes or len(content) > max_bytes:
        raise InvalidRequest(f"the file is larger than {max_bytes} bytes", param=param)
    return content


def _open_below(root: Path, parts: Sequence[str]) -> int:
    """Open a file step by step without following links: one that is put there meanwhile leads nowhere."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Not blocking: a named pipe would wait for its writer.
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
