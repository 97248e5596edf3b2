"""How much memory a piece of work needs, from the kernel's own high-water mark (Linux; elsewhere: unknown)."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import TracebackType

from llmfast import backend

__all__ = ["Peak", "available", "peak_rss"]

STATUS = Path("/proc/self/status")
MEMORY = Path("/proc/meminfo")
CLEAR = Path("/proc/self/clear_refs")


def peak_rss(field: str = "VmHWM") -> int | None:
    """Bytes of the largest resident set of this process (``VmRSS``: of the current one), or None where unknown."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


def available() -> int | None:
    """Bytes that new processes may take without anything being swapped out, or None where unknown."""
    try:
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


class Peak:
    """Measures, in a ``with`` block, the most memory in use beyond what was there before.

    llmfast's workspace from earlier calls counts as new, because the block's calls reuse it.

    Attributes:
        bytes: the result, None where it cannot be measured or `enabled` is False.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.bytes: int | None = None
        self._enabled = enabled and sys.platform == "linux"

    def __enter__(self) -> Peak:
        if self._enabled:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
            if trim:
                trim(0)  # memory that malloc keeps would otherwise be reused unseen
            self._workspace = backend.native().workspace_bytes()
            try:
                CLEAR.write_text("5")  # resets the high-water mark
            except OSError:
                self._enabled = False
            self._before = peak_rss("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = peak_rss() if self._enabled else None
        if peak is not None and self._before is not None:
            self.bytes = max(0, peak - self._before) + self._workspace
