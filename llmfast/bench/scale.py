"""Throughput as scale grows: training steps over model size, sequence length, batch and threads, and the trend of each.

A point of a sweep is a training step as in `steps`, with all its peers and checks. A trend is a power law, a straight
line in logarithms, fitted by least squares: tokens/s ~ x^exponent. Its residual says how far off the law is, as a
factor: 1.05 means that the points lie 5% from it (root mean square). A law needs three points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmfast.bench.harness import Budget
from llmfast.bench.limits import Limits
from llmfast.bench.memory import available
from llmfast.bench.steps import StepCase, measure_step
from llmfast.models import GPTConfig

__all__ = ["SWEEPS", "Point", "Trend", "fit", "measure_point", "points", "providers_of", "series", "trends"]

Size = Literal["full", "quick", "smoke"]

SWEEPS = {"parameters": "model size", "T": "sequence length", "B": "batch", "threads": "threads"}  # x axis, in words

# Layers and width of GPTs from 2M parameters on, vocabulary 8192
MODELS = (
    (4, 128),
    (6, 256),
    (8, 384),
    (12, 512),
    (12, 768),
    (24, 1024),
    (24, 1536),
    (32, 2048),
    (40, 2560),
    (48, 3200),
)
BYTES_PER_PARAMETER = 20  # weight, gradient, two moments, and what the step keeps of them meanwhile; float32
LEAST_POINTS = 3


@dataclass(frozen=True)
class Point:
    """One point of a sweep: `sweep` is a key of `SWEEPS`, `x` where on its axis the case lies."""

    sweep: str
    x: int
    case: StepCase
    threads: int

    @property
    def label(self) -> str:
        return f"{self.sweep}={self.x:,}: {self.case.label}, {self.threads} threads"


@dataclass(frozen=True)
class Trend:
    """``y = factor * x ** exponent``; `residual` is the factor by which points are off (1: not at all)."""

    factor: float
    exponent: float
    residual: float
    points: int

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent


def _gpt(layers: int, width: int, context: int, vocab_size: int = 8192) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size, context=context, layers=layers, heads=width // 64, width=width, norm="rms_norm",
        activation="silu", gated=True, ffn_width=64 * round(width / 24), position="rotary", bias=False,
    )  # fmt: skip


def points(
    size: Size, dtype: str, threads: int, compile: bool = False, only: Sequence[str] | None = None
) -> list[Point]:
    """All points, sweep by sweep, the cheapest first.

    Args:
        only: names of sweeps; default: all.
        threads: of the sweeps other than ``threads``, which goes up to as many.

    Raises:
        ValueError: `only` names something else.
    """
    unknown = [name for name in only or () if name not in SWEEPS]
    if unknown:
        raise ValueError(f"only: got {', '.join(unknown)}, expected some of {', '.join(SWEEPS)}")

    def case(layers: int, width: int, B: int, T: int, vocab_size: int = 8192) -> StepCase:
        config = _gpt(layers, width, T, vocab_size)
        return StepCase(f"{layers}x{width}", dtype, B, T, compile=compile, config=config)

    if size == "smoke":
        found = [Point("T", T, case(2, 64, 1, T, 256), threads) for T in (16, 32)]
        return [p for p in found if only is None or p.sweep in only]
    quick = size == "quick"
    small = (4, 128) if quick else (6, 256)
    models = MODELS[:3] if quick else MODELS
    lengths = (128, 512, 2048) if quick else [2**n for n in range(7, 16)]
    batches = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64)
    found = []
    for layers, width in models:
        one = case(layers, width, *((4, 128) if quick else (4, 256)))
        found.append(Point("parameters", one.shape.parameters(), one, threads))
    for T in lengths:
        found.append(Point("T", T, case(*small, max(1, lengths[2] // T), T, 1024), threads))
    for B in batches:
        found.append(Point("B", B, case(*small, B, 128), threads))
    for n in sorted({*(2**i for i in range(10) if 2**i < threads), threads}):
        found.append(Point("threads", n, case(6, 256, 4, 256), n))
    return [p for p in found if only is None or p.sweep in only]


def measure_point(
    point: Point, limits: Limits | None, budget: Budget, timeout: float, progress: Callable[[str], None]
) -> dict:
    """The point's part of a JSON row (see `rows`). A model that memory does not allow is a row without times."""
    providers = sum(not isinstance(spec, str) for spec in point.case.providers(1).values())
    need = providers * point.case.shape.parameters() * BYTES_PER_PARAMETER
    free = available()
    if free is not None and need > free:
        note = f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        found = {
            name: {"ours": name == "llmfast", "status": "skipped", "note": note} for name in point.case.providers(1)
        }
        row = {"dims": {}, "flops": point.case.flops, "bytes": None, "limit": "compute", "providers": found}
        row["best"] = {"llmfast": None, "peer": None, "ratio": None}
        row.update(case="training step", direction="step", dtype=point.case.dtype)
    else:
        row = measure_step(point.case, limits, budget, point.threads, timeout, progress)
    dims = {"sweep": point.sweep, "model": point.case.preset, "parameters": point.case.shape.parameters()}
    dims.update(B=point.case.B, T=point.case.T)
    return {**row, "kind": "scale", "dims": dims, "x": point.x, "threads": point.threads}


def fit(xs: Sequence[float], ys: Sequence[float]) -> Trend | None:
    """The power law through the points; None for fewer than three.

    Example:
        >>> fit([1, 10, 100], [5, 50, 500]).exponent
        1.0
    """
    if len(xs) < LEAST_POINTS or len(set(xs)) < LEAST_POINTS:
        return None
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(xs), sum(log_y) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y)) / sum((x - mean_x) ** 2 for x in log_x)
    off = [y - mean_y - slope * (x - mean_x) for x, y in zip(log_x, log_y)]
    residual = math.exp(math.sqrt(sum(e * e for e in off) / len(off)))
    return Trend(math.exp(mean_y - slope * mean_x), round(slope, 12), residual, len(xs))


def providers_of(rows: Sequence[dict]) -> list[str]:
    """Names of the providers that were timed anywhere, llmfast first."""
    names = dict.fromkeys(n for row in rows for n, p in row["providers"].items() if "median_ms" in p)
    return sorted(names, key=lambda name: name != "llmfast")


def series(rows: Sequence[dict], sweep: str, provider: str, what: str) -> tuple[list[float], list[float]]:
    """x and y of one line: `what` is ``tokens_per_s``, ``share`` or ``memory_mb``."""
    found = [
        (row["x"], row["providers"][provider][what])
        for row in rows
        if row["dims"]["sweep"] == sweep and row["providers"].get(provider, {}).get(what)
    ]
    found.sort()
    return [x for x, _ in found], [y for _, y in found]


def trends(rows: Sequence[dict]) -> dict[tuple[str, str, str], Trend]:
    """By (sweep, provider, tokens_per_s or memory_mb), where there are points enough."""
    found = {}
    for sweep in SWEEPS:
        for provider in providers_of(rows):
            for what in ("tokens_per_s", "memory_mb"):
                trend = fit(*series(rows, sweep, provider, what))
                if trend:
                    found[sweep, provider, what] = trend
    return found
