"""Copies of cached blocks outside the device pool: in host memory, and as files that outlive the process.

A file holds one block and is named by its hash, so its content never changes; it is written beside its place and moved
there, and carries a checksum, so a torn one is found when it is read. Two servers may share a folder. The folder's name
has the format's version and a digest of model and layout; all of them together stay under one size.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

logger = logging.getLogger(__name__)

FORMAT = "v1"
MAGIC = b"TANDEMKV"
_HEAD = struct.Struct("<8sII")  # magic, length of the description, checksum of description and content
TEMPORARY_AGE_S = 600.0  # an unfinished file as old as this is nobody's, whatever process has its number now
PAUSE_AFTER_ERROR_S = 30.0  # a full disk is not asked again before

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Described(msgspec.Struct, frozen=True):
    """What a file says about itself."""

    num_bytes: int
    states: list[tuple[int, str, list[int]]]  # (recurrent layer, dtype, shape); -1 as layer: none
    layout: str  # of keys and values: dtype and shapes, in words that must match


@dataclass(frozen=True)
class ArchivedState:
    """One array of one recurrent layer, shape (1, ...)."""

    layer: int
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Copy:
    """One block: keys and values of all layers as bytes, and the recurrent state behind it where there is one."""

    content: Bytes
    states: tuple[ArchivedState, ...] | None
    has_window: bool

    @property
    def nbytes(self) -> int:
        return self.content.nbytes + sum(len(s.data) for s in self.states or ())

    @property
    def flags(self) -> str:
        return ("w" if self.has_window else "") + ("s" if self.states is not None else "")


class Archive:
    """All methods may be called from any thread.

    Args:
        root: holds one folder for each format and model.
        fingerprint: of the model.
        layout: of a block's content; files of another one are not read.
        ssd_bytes, host_bytes: most bytes of files and of copies in memory; 0 switches a tier off.
    """

    def __init__(self, root: Path, fingerprint: str, layout: str, ssd_bytes: int, host_bytes: int) -> None:
        self._root = root
        digest = blake2b(f"{fingerprint}\0{layout}".encode(), digest_size=16).hexdigest()
        self._folder = root / f"{FORMAT}-{digest}"
        self._layout = layout
        self._ssd_bytes, self._host_bytes = ssd_bytes, host_bytes
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, int] = OrderedDict()  # least recently used first -> bytes
        self._flags: dict[bytes, str] = {}  # blocks of this model that have a file
        self._host: OrderedDict[bytes, Copy] = OrderedDict()
        self._file_bytes = self._copy_bytes = 0
        self._num_errors = 0
        self._paused_until = 0.0
        if ssd_bytes:
            self._scan()

    # ------------------------------------------------ state

    def blocks(self) -> dict[bytes, str]:
        """Every block that can be read: hash -> flags ("w": sliding rows, "s": recurrent state)."""
        with self._lock:
            return self._flags | {h: c.flags for h, c in self._host.items()}

    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """(blocks, bytes) by tier; files of other models count as bytes."""
        with self._lock:
            blocks = {"host": len(self._host), "ssd": len(self._flags)}
            return blocks, {"host": self._copy_bytes, "ssd": self._file_bytes}

    def take_errors(self) -> int:
        """Files that could not be written or read since the last call."""
        with self._lock:
            count, self._num_errors = self._num_errors, 0
            return count

    def has(self, block_hash: bytes, flags: str) -> bool:
        """Whether a copy with at least these parts is there, or cannot be made at present."""
        with self._lock:
            known = self._flags.get(block_hash) if self._ssd_bytes else None
            if known is None and block_hash in self._host:
                known = self._host[block_hash].flags
            is_paused = not self._host_bytes and time.monotonic() < self._paused_until
            return is_paused or (known is not None and set(known) >= set(flags))

    # ------------------------------------------------ write

    def put(self, block_hash: bytes, copy: Copy) -> tuple[bool, list[bytes]]:
        """Keep a copy in every tier that is on; whether one holds it now, and which blocks no tier holds any more."""
        removed: list[bytes] = []
        if self._host_bytes >= copy.nbytes:
            removed += self._put_host(block_hash, copy)
        is_written = bool(self._ssd_bytes) and self._put_file(block_hash, copy, removed)
        with self._lock:
            gone = [h for h in removed if h not in self._flags and h not in self._host]
            return is_written or block_hash in self._host, gone

    def _put_host(self, block_hash: bytes, copy: Copy) -> list[bytes]:
        removed = []
        with self._lock:
            old = self._host.pop(block_hash, None)
            self._copy_bytes += copy.nbytes - (old.nbytes if old is not None else 0)
            self._host[block_hash] = copy
            while self._copy_bytes > self._host_bytes:
                name, dropped = self._host.popitem(last=False)
                self._copy_bytes -= dropped.nbytes
                removed.append(name)
        return removed

    def _put_file(self, block_hash: bytes, copy: Copy, removed: list[bytes]) -> bool:
        if time.monotonic() < self._paused_until:
            return False
        path = self._path(block_hash, copy.flags)
        states = copy.states
        described = Described(
            num_bytes=copy.content.nbytes,
            states=[(s.layer, s.dtype, list(s.shape)) for s in states or ()],
            layout=self._layout,
        )
        description = msgspec.msgpack.encode(described)
        parts: list[bytes | memoryview] = [description, copy.content.data, *(s.data for s in states or ())]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(_HEAD.pack(MAGIC, len(description), checksum))
                file.writelines(parts)
            size = temporary.stat().st_size
            temporary.replace(path)
        except OSError as error:
            with self._lock:
                self._num_errors += 1
                self._paused_until = time.monotonic() + PAUSE_AFTER_ERROR_S
            logger.warning("cached blocks are not written to SSD for %.0f s: %s", PAUSE_AFTER_ERROR_S, error)
            temporary.unlink(missing_ok=True)
            return False
        with self._lock:
            poorer = self._flags.get(block_hash)
            if poorer is not None and poorer != copy.flags:
                self._forget_file(self._path(block_hash, poorer), delete=True)
            self._remember_file(path, size)
            self._flags[block_hash] = copy.flags
            while self._file_bytes > self._ssd_bytes and len(self._files) > 1:
                oldest = next(iter(self._files))
                removed += self._forget_file(oldest, delete=True)
        return True

    def drop_copies(self) -> list[bytes]:
        """Give back the host tier's memory; the blocks that no tier holds any more."""
        with self._lock:
            gone = [h for h in self._host if h not in self._flags]
            self._host.clear()
            self._copy_bytes = 0
            return gone

    def clear(self) -> None:
        """Delete every copy of this model's blocks."""
        with self._lock:
            self._host.clear()
            self._copy_bytes = 0
            for path in [p for p in self._files if p.parent == self._folder]:
                self._forget_file(path, delete=True)

    # ------------------------------------------------ read

    def get(self, block_hash: bytes) -> Copy | None:
        """The copy; None if it is gone or damaged, in which case it is forgotten."""
        with self._lock:
            held = self._host.get(block_hash)
            if held is not None:
                self._host.move_to_end(block_hash)
                return held
            flags = self._flags.get(block_hash)
        if flags is None:
            return None
        path = self._path(block_hash, flags)
        copy = self._read(path, flags)
        with self._lock:
            if copy is None:
                self._num_errors += 1
                self._forget_file(path, delete=True)
            elif path in self._files:
                self._files.move_to_end(path)
        return copy

    def _read(self, path: Path, flags: str) -> Copy | None:
        """Check everything before believing it: the file may be torn, or somebody else's."""
        try:
            data = np.fromfile(path, np.uint8)
            os.utime(path)
            magic, length, checksum = _HEAD.unpack(data[: _HEAD.size].tobytes())
            if magic != MAGIC or zlib.crc32(data[_HEAD.size :].data) != checksum:
                raise ValueError("its checksum does not match")
            at = _HEAD.size + length
            described = msgspec.msgpack.decode(data[_HEAD.size : at].tobytes(), type=Described)
            if described.layout != self._layout:
                raise ValueError("it was written for another layout")
            content = data[at : at + described.num_bytes]
            at += described.num_bytes
            states = []
            for layer, dtype, shape in described.states:
                size = int(np.prod(shape)) * _ITEM_BYTES[dtype]
                states.append(ArchivedState(layer, dtype, tuple(shape), data[at : at + size].tobytes()))
                at += size
            if at != data.nbytes:
                raise ValueError("its length does not match")
            return Copy(content, tuple(states) if "s" in flags else None, "w" in flags)
        except FileNotFoundError:
            return None  # another server made room
        except (OSError, ValueError, KeyError, struct.error, msgspec.MsgspecError) as error:
            logger.warning("dropped the cached block %s: %s", path.name, error)
            return None

    # ------------------------------------------------ files

    def _path(self, block_hash: bytes, flags: str) -> Path:
        return self._folder / f"{block_hash.hex()}-{flags}.kv"

    def _scan(self) -> None:
        """Find what earlier processes left: least recently used first, by the time of the last use."""
        found: list[tuple[float, Path, int]] = []
        now = time.time()
        for path in self._root.glob(f"{FORMAT}-*/*"):
            try:
                stat = path.stat()
            except OSError:
                continue  # another server removed it
            if path.suffix == ".kv" and not path.name.startswith("."):
                found.append((stat.st_mtime, path, stat.st_size))
            elif now - stat.st_mtime > TEMPORARY_AGE_S or not _is_written(path):
                path.unlink(missing_ok=True)
        for _, path, size in sorted(found):
            self._remember_file(path, size)
            name, _, flags = path.stem.partition("-")
            if path.parent == self._folder:
                try:
                    self._flags[bytes.fromhex(name)] = flags
                except ValueError:
                    continue  # not a name of ours
        while self._file_bytes > self._ssd_bytes and self._files:
            self._forget_file(next(iter(self._files)), delete=True)

    def _remember_file(self, path: Path, size: int) -> None:
        self._file_bytes += size - self._files.pop(path, 0)
        self._files[path] = size

    def _forget_file(self, path: Path, delete: bool) -> list[bytes]:
        """The hash of the block that has no file now."""
        self._file_bytes -= self._files.pop(path, 0)
        if delete:
            path.unlink(missing_ok=True)
        if path.parent != self._folder:
            return []
        name, _, flags = path.stem.partition("-")
        block_hash = bytes.fromhex(name)
        if self._flags.get(block_hash) == flags:
            del self._flags[block_hash]
        return [block_hash]


def _is_written(temporary: Path) -> bool:
    """Whether the process that began this file may still be there. One of another machine that shares the folder looks
    as if it had died: it counts an error and writes the block again later."""
    pid = temporary.suffix[1:]
    return pid.isdigit() and psutil.pid_exists(int(pid))


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint8": 1, "bool": 1}
