"""What runs where: the native module, its dispatch tables, and a count of everything that did not run natively.

Environment:
    LLMFAST_CPU_ISA: ``ref``, ``avx2``, ``avx512``, ``avx512bf16`` or ``amx``: the best instruction set that may be
    used (a cap).
    LLMFAST_STRICT: ``1`` makes a fallback to plain torch an error.
    LLMFAST_DETERMINISTIC: ``1`` asks for the same bits every time, as `deterministic_sums` does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

__all__ = [
    "check_memory",
    "check_threads",
    "choose_device",
    "count_fallback",
    "deterministic",
    "deterministic_sums",
    "fallbacks",
    "fastest_dtype",
    "force",
    "get_float32_matmul_precision",
    "implementations",
    "info",
    "keep_freed_memory",
    "memory_bytes",
    "native",
    "native_cuda",
    "native_for",
    "ops",
    "set_float32_matmul_precision",
    "stream_of",
    "why_not_native",
]

ISAS = ("ref", "avx2", "avx512", "avx512bf16", "amx")
# Where a container's own limit stands, for the two versions of control groups.
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
MOST_THREADS = 1024  # OpenMP ends the process where the system does not give as many as asked for

# Looked for once, as a file: torch.compile may ask before anything has run.
_CUDA_WAS_BUILT = importlib.util.find_spec("llmfast._cuda") is not None

# A torch without CUDA has no other tensors than the CPU's, and does not pay for the question.
_TORCH_HAS_CUDA = torch.version.cuda is not None

_native: ModuleType | None = None
_native_cuda: ModuleType | None = None
_fallbacks: Counter[tuple[str, str]] = Counter()
_deterministic: bool | None = True if os.environ.get("LLMFAST_DETERMINISTIC") == "1" else None


def native() -> ModuleType:
    """The compiled module ``llmfast._cpu``.

    Raises:
        ImportError: it was not built for this Python, with what to do about it.
        ValueError: ``LLMFAST_CPU_ISA`` names no instruction set.
    """
    global _native
    if _native is None:
        cap = os.environ.get("LLMFAST_CPU_ISA")
        if cap and cap not in ISAS:
            raise ValueError(f"LLMFAST_CPU_ISA: got {cap!r}, expected one of {', '.join(ISAS)}")
        try:
            from llmfast import _cpu
        except ImportError as error:
            raise ImportError(
                f"llmfast's compiled module for Python {platform.python_version()} cannot be loaded ({error}). "
                "Install the package with this Python: pip install . (from a checkout) or pip install llmfast"
            ) from error
        _native = _cpu
    return _native


def native_cuda() -> ModuleType | None:
    """The compiled module ``llmfast._cuda``, or None where this installation was built without it.

    Raises:
        ImportError: it is there and cannot be loaded.
    """
    global _native_cuda
    if _native_cuda is None and _CUDA_WAS_BUILT:
        from llmfast import _cuda

        _native_cuda = _cuda
    return _native_cuda


def native_for(tensor: object) -> ModuleType | None:
    """The compiled module that takes `tensor`: `native_cuda` for one on a GPU, else `native`. Both have the same ops."""
    return native_cuda() if _TORCH_HAS_CUDA and getattr(tensor, "is_cuda", False) else native()


def why_not_native(device: torch.device) -> str | None:
    """Why tensors on `device`, which is not the CPU, run in plain torch; None where ops with a CUDA kernel run it."""
    if device.type != "cuda":
        return f"no kernel for device {device.type}"
    if not _CUDA_WAS_BUILT:
        return "no kernel for device cuda: llmfast was built without CUDA (set LLMFAST_CUDA=on when installing it)"
    return None if torch.compiler.is_compiling() else _why_not_on_gpu(device.index)


@functools.cache
def _why_not_on_gpu(index: int) -> str | None:
    devices = native_cuda().devices()
    if index < len(devices) and devices[index]["supported"]:
        return None
    return f"no kernel for device cuda:{index}: llmfast needs compute capability 8.0 or later"


def choose_device(name: str = "auto") -> torch.device:
    """The device that `name` means: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is the first GPU that llmfast has kernels for,
    else the CPU.

    Raises:
        ValueError: it is another kind of device, or a GPU that this machine, or this torch, does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        native = (torch.device("cuda", i) for i in range(gpus) if why_not_native(torch.device("cuda", i)) is None)
        return next(native, torch.device("cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        built = "" if torch.version.cuda else ", and this torch is built without CUDA"
        raise ValueError(f"device: got {name!r}, but torch finds {gpus or 'no'} GPU{'s' * (gpus > 1)} here{built}")
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)


def stream_of(tensor: torch.Tensor) -> int:
    """The handle of the caller's current stream on the device of `tensor`, as the native functions take it."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0


def fastest_dtype(device: torch.device | None = None) -> str:
    """The dtype in which `device` (default: the processor) multiplies matrices fastest: ``bfloat16`` on a GPU and where
    the processor has instructions for it."""
    on_gpu = device is not None and device.type == "cuda"
    return "bfloat16" if on_gpu or ISAS.index(native().active_isa()) >= ISAS.index("avx512bf16") else "float32"


def set_float32_matmul_precision(precision: str) -> None:
    """How exactly `linear`, `ffn` and `linear_cross_entropy`, and all modules made of them, multiply float32 matrices on
    the processor, forward and backward, in the whole process.

    ``"highest"``, the default: in float32. ``"high"``: on AMX each value as the sum of two bfloat16 (about 16 bits of its
    mantissa), summed in float32: three products of bfloat16 in place of one of float32, with an error below 1e-5 of its
    largest result. Infinities, and values beyond 3.39e38, become NaN, and halves of values that are subnormal count as
    zero. With few rows, on other processors and on GPUs it changes nothing. Attention is always in float32.
    torch's setting of this name, which is about its own products, is not read.

    Raises:
        ValueError: `precision` is neither.

    Example:
        >>> llmfast.backend.set_float32_matmul_precision("high")
    """
    if precision not in ("highest", "high"):
        raise ValueError(f"precision: got {precision!r}, expected 'highest' or 'high'")
    native().split_float32(precision == "high")


def get_float32_matmul_precision() -> str:
    """``"highest"`` or ``"high"``; see `set_float32_matmul_precision`."""
    return "high" if native().float32_is_split() else "highest"


def memory_bytes(device: torch.device | None = None) -> int | None:
    """Bytes of memory this process may use: the machine's, or its container's; those of `device`, if that is a GPU. None
    where the system does not say."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    for path in MEMORY_LIMITS:
        try:
            sizes.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(sizes)


def check_memory(what: str, needed: int, device: torch.device | None = None) -> None:
    """ValueError, which begins with `what` was asked for, if it takes more than `memory_bytes`: the system would end this
    process, or torch would name none of its options."""
    there = memory_bytes(device)
    if there is not None and needed > there:
        raise ValueError(f"{what} at least {needed / 2**30:,.1f} GiB of memory, and there are {there / 2**30:,.1f} GiB")


def keep_freed_memory() -> bool:
    """Makes this process's allocator keep freed memory instead of returning it to the system.

    A training step allocates and frees the same large tensors over and over; without this, glibc maps each one afresh,
    at the cost of a page fault for every 4 KiB. `llmfast.train.pretrain` calls it. Affects the whole process, torch's
    tensors included, for as long as it runs: its memory stays at its peak. False where the C library is not glibc.
    """
    return native().keep_freed_memory()


def count_fallback(op: str, reason: str) -> None:
    """Notes that `op` runs in plain torch, and why. With ``LLMFAST_STRICT=1`` raises RuntimeError instead."""
    if os.environ.get("LLMFAST_STRICT") == "1":
        raise RuntimeError(f"{op}: {reason}, so it would fall back to plain torch, and LLMFAST_STRICT=1 forbids that")
    _fallbacks[op, reason] += 1


def fallbacks() -> dict[str, int]:
    """Calls that ran in plain torch since the process started: ``{"op: reason": calls}``."""
    return {f"{op}: {reason}": calls for (op, reason), calls in sorted(_fallbacks.items())}


def ops() -> list[str]:
    """Names of all native ops."""
    return native().ops()


def implementations(op: str) -> list[dict]:
    """The dispatch table of `op`: the CPU's rows, best first, then the GPU's (``sm90a``, ``sm80``) if they were built.

    Each row has ``isa``, ``dtypes`` (names), ``available``, ``why_not`` (empty if available) and ``calls`` so far. The row
    ``amx_split`` is there on request: see `set_float32_matmul_precision`.

    Raises:
        ValueError: there is no native op of that name; see `ops`.
    """
    rows = native().implementations(op)
    return rows + native_cuda().implementations(op) if _CUDA_WAS_BUILT else rows


class _OpenBlocks:
    """What the ``with`` blocks that are open now ask for, earliest first. Those of several threads may overlap."""

    def __init__(self) -> None:
        self.asked: tuple[list, ...] = ()  # a list of one each, so that equal ones are told apart
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def open(self, what: object, changed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """`changed` is called when `asked` has got or lost `what`."""
        block = [what]
        with self._lock:
            self.asked += (block,)
            changed()
        try:
            yield
        finally:
            with self._lock:
                self.asked = tuple(other for other in self.asked if other is not block)
                changed()


_caps, _orders = _OpenBlocks(), _OpenBlocks()


@contextlib.contextmanager
def force(isa: str) -> Iterator[None]:
    """Caps the instruction set to `isa` inside a ``with`` block (for the whole process, not for one thread). While several
    blocks are open, the lowest cap holds.

    Raises:
        ValueError: `isa` is unknown, or better than this machine or ``LLMFAST_CPU_ISA`` allows.

    Example:
        >>> with llmfast.backend.force(isa="ref"):
        ...     y = llmfast.linear(x, weight)
    """
    best = _best_isa()
    if isa not in ISAS or ISAS.index(isa) > ISAS.index(best):
        raise ValueError(f"isa: got {isa!r}, expected one of {ISAS[: ISAS.index(best) + 1]} on this machine")
    with _caps.open(isa, _set_cap):
        yield


@functools.cache
def _best_isa() -> str:
    """What runs where nobody asks for less."""
    return native().active_isa()


def _set_cap() -> None:
    native().set_isa_cap(min((isa for (isa,) in _caps.asked), key=ISAS.index, default=_best_isa()))


@contextlib.contextmanager
def deterministic_sums(asked: bool = True) -> Iterator[None]:
    """Inside a ``with`` block (for the whole process) gradients have the same bits every time, whatever torch's own
    switch says; with ``asked=False`` they need not. While several blocks are open, the one opened last has its way.

    It matters for one thing: the gradient of q for long sequences on Hopper GPUs, whose sums otherwise are added in an
    order that varies, some 4 to 24% faster. All else, and everything on CPUs, has a fixed order.

    Example:
        >>> with llmfast.backend.deterministic_sums():
        ...     loss.backward()
    """
    with _orders.open(bool(asked)):
        yield


def deterministic() -> bool:
    """Whether sums must have a fixed order: as `deterministic_sums` or ``LLMFAST_DETERMINISTIC`` say, or else as
    `torch.use_deterministic_algorithms` does."""
    if blocks := _orders.asked:
        return blocks[-1][0]
    return torch.are_deterministic_algorithms_enabled() if _deterministic is None else _deterministic


def _best_rows(rows: list[dict]) -> dict[str, str | None]:
    return {
        dtype: next((row["isa"] for row in rows if row["available"] and dtype in row["dtypes"]), None)
        for dtype in ("float32", "bfloat16", "float16")
    }


def check_threads(threads: int | None) -> None:
    """ValueError for an option `threads` that is neither None nor a number of threads that a machine may have."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads: got {threads}, expected 1 to {MOST_THREADS}")


def info() -> dict:
    """What this process runs on: versions, processor, instruction sets, threads, GPU, chosen rows and fallbacks."""
    import llmfast

    module = native()
    chosen = {}
    for op in module.ops():
        chosen[op] = _best_rows(module.implementations(op))
    cuda = native_cuda()
    return {
        "llmfast": llmfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": module.cpu_name().strip(),
        "cpu_features": module.cpu_features(),
        "isa": module.active_isa() + (" (emulated)" if module.emulated else ""),
        "isa_detected": module.detected_isa(),
        "isa_cap": os.environ.get("LLMFAST_CPU_ISA"),
        "threads": torch.get_num_threads(),
        "native_threads": module.max_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "implementations": chosen,
        "cuda_devices": [] if cuda is None else cuda.devices(),
        "cuda_implementations": {} if cuda is None else {op: _best_rows(cuda.implementations(op)) for op in cuda.ops()},
        "fallbacks": fallbacks(),
        "workspace_bytes": module.workspace_bytes(),
    }
