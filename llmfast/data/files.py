"""Small file helpers the data layer shares: fingerprints, atomic writes, a folder lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: called now and then by slow steps; the unit belongs to the stage."""


def new_digest() -> Any:
    """The hash behind every fingerprint and checksum here: BLAKE2b, 128 bits (about 1 GB/s, no extra package)."""
    return hashlib.blake2b(digest_size=16)


def fingerprint_of(value: Any) -> str:
    """32 hex digits that identify a JSON-able value; equal values give equal digits on every machine."""
    digest = new_digest()
    digest.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only when the block ends well.

    The bytes go to a temporary file beside it, are fsynced, then renamed over `path`: a reader, or the next run after
    a crash, sees the whole old file or the whole new one. If the block raises, `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without this the rename itself may be lost when the machine stops
    finally:
        os.close(folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one process: the ranks of a job wait for the first one, then find its work done.

    The kernel drops the lock when its holder dies, so a killed run never blocks the next one.
    """
    import fcntl  # POSIX only, and only needed by a process that writes

    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
