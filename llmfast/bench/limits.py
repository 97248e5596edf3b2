"""What this machine can do at most, measured here and now: the denominators of every share in the tables.

Arithmetic: the fastest of several matrix products that fit the caches, by llmfast or by torch, on random data (on zeros
processors draw less power and clock higher). Memory: the fastest copy, by torch or by memcpy in as many threads, for
several sizes, because a copy within the caches is several times faster than one through memory.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llmfast import ops

__all__ = ["Limits", "fastest"]

PRODUCTS = ((256, 256, 256), (512, 512, 512), (384, 768, 1536), (1024, 1024, 1024))  # M, K, N
COPY_SIZES = tuple(2**n for n in (20, 22, 24, 26, 28))  # bytes read plus bytes written, halved: the buffer's size
READ_BYTES = 2**28


@dataclass(frozen=True)
class Limits:
    """Measured limits.

    Attributes:
        flops: FLOP/s for each dtype's name.
        copy: bytes/s, read and written together, for each total of bytes moved.
        read: bytes/s, read only, from memory.
    """

    flops: dict[str, float]
    copy: dict[int, float]
    read: float

    @classmethod
    def measure(cls, dtypes: Sequence[torch.dtype], seconds: float = 0.2) -> Limits:
        """Takes up to `seconds` for each of about a dozen measurements."""
        wide = _peak_flops(torch.float32, seconds)
        flops = {"float32": wide}
        for dtype in dtypes:
            if dtype != torch.float32:
                # without instructions for the narrow dtype, products run on float32 units: theirs is the limit
                flops[_name(dtype)] = max(wide, _peak_flops(dtype, seconds))
        return cls(flops, {2 * size: _copy_speed(size, seconds) for size in COPY_SIZES}, _read_speed(seconds))

    def least_seconds(self, dtype: torch.dtype | str, flops: float, moved: float) -> tuple[float, str]:
        """The least time for `flops` operations and `moved` bytes, and what sets it: ``compute`` or ``memory``.

        Bytes count at the speed of a copy of at most that size.
        """
        compute = flops / self.flops[_name(dtype)]
        sizes = [size for size in self.copy if size <= moved]
        memory = moved / self.copy[max(sizes, default=min(self.copy))]
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def as_row(self) -> dict:
        """For a JSON row: GFLOP/s and GB/s."""
        return {
            "gflops": {name: round(value / 1e9, 1) for name, value in self.flops.items()},
            "copy_gbs": {str(size): round(value / 1e9, 1) for size, value in self.copy.items()},
            "read_gbs": round(self.read / 1e9, 1),
        }


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call among those that fit in `seconds` (at least 3, after 1 to warm up)."""
    call()
    best, end, calls = math.inf, time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _peak_flops(dtype: torch.dtype, seconds: float) -> float:
    best = 0.0
    for M, K, N in PRODUCTS:
        x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
        for product in (ops.linear, torch.nn.functional.linear):
            best = max(best, 2 * M * N * K / fastest(lambda: product(x, weight), seconds / 4))  # noqa: B023
    return best


def _copy_speed(size: int, seconds: float) -> float:
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    best = fastest(lambda: target.copy_(source), seconds / 2)
    threads = torch.get_num_threads()
    piece = size // threads

    def memcpy(i: int) -> None:  # ctypes lets go of the GIL; large memcpys store around the caches
        ctypes.memmove(target.data_ptr() + i * piece, source.data_ptr() + i * piece, piece)

    with ThreadPoolExecutor(threads) as pool:
        best = min(best, fastest(lambda: list(pool.map(memcpy, range(threads))), seconds / 2))
    return 2 * size / best


def _read_speed(seconds: float) -> float:
    source = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / fastest(source.sum, seconds)
