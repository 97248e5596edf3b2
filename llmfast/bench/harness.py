"""One case: hold every provider against the oracle, then time those that are right, in turns.

The error rule: against float64, at most twice the error of the baseline (plain torch in the same dtype) plus 1e-5 of
the largest value. Providers that break it, or fail, are listed with the reason and not timed. Timing goes round the
providers (same process, inputs and threads), so that a neighbour's burst of work hits them all; the median and the
interquartile range of the samples are reported.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from llmfast import backend
from llmfast.bench import memory
from llmfast.bench.limits import Limits

__all__ = ["Activity", "Budget", "Case", "Contest", "Provider", "compare", "errors", "measure", "schedule", "summary"]

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        run: what is timed.
        check: returns the results to hold against the oracle; default: `run` does.
        slack: allowed error, in errors of the baseline. More than 2 only for what trades accuracy for speed.
        isa: instruction set to force while it runs.
        precision: of float32 products while it runs (`backend.set_float32_matmul_precision`).
        compiles: the first call compiles, so the second one counts as the first.
        ours: whether it is llmfast.
    """

    run: Callable[[], object]
    check: Callable[[], Tensors] | None = None
    slack: float = 2.0
    isa: str | None = None
    precision: str = "highest"
    compiles: bool = False
    ours: bool = False

    def results(self) -> Tensors:
        return (self.check or self.run)()

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        before = backend.get_float32_matmul_precision()
        backend.set_float32_matmul_precision(self.precision)
        try:
            with backend.force(self.isa) if self.isa else contextlib.nullcontext():
                yield
        finally:
            backend.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Contest:
    """A case with its inputs made: the providers by name (a string says why one cannot run) and the truth."""

    oracle: Callable[[], Tensors]
    baseline: str
    providers: dict[str, Provider | str]


@dataclass(frozen=True)
class Case:
    """A computation with its sizes. `flops` and `moved` are the least operations and bytes that it takes.

    Attributes:
        op: public name, as in `llmfast`.
        direction: ``forward``, ``backward``, ``forward+backward`` or ``step``.
        build: makes inputs (always the same) and providers.
        memory: whether the memory that a call needs is worth a column.
    """

    op: str
    direction: str
    dtype: torch.dtype
    dims: dict[str, int]
    flops: int
    moved: int
    build: Callable[[], Contest]
    memory: bool = False
    options: dict[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in {**self.dims, **self.options}.items())
        return f"{self.op} {self.direction} {str(self.dtype).removeprefix('torch.')} {sizes}"


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds: of timed calls for each provider.
        rounds: fewest and most samples of a provider.
        slow: a provider whose first call takes longer is not called again: that call is its only sample.
        case: seconds after which a case takes on no further peer.
        timed: False stops after the check.
    """

    seconds: float = 1.0
    rounds: tuple[int, int] = (3, 40)
    slow: float = 3.0
    case: float = 30.0
    timed: bool = True

    def samples(self, seconds: float) -> int:
        """How many samples of a call that takes `seconds`."""
        fewest, most = self.rounds
        if seconds > self.seconds:
            fewest = min(2, fewest)
        return max(fewest, min(most, int(self.seconds / max(seconds, 1e-6))))


class Activity:
    """What ran where since it was made: did llmfast's kernels do the work?"""

    def __init__(self) -> None:
        self._fallbacks, self._calls = backend.fallbacks(), _native_calls()

    def fell_back(self) -> str:
        """Empty if native kernels ran and nothing fell back, else what did."""
        new = {what: n - self._fallbacks.get(what, 0) for what, n in backend.fallbacks().items()}
        reasons = [f"{what} ({n}x)" for what, n in new.items() if n > 0]
        if _native_calls() == self._calls:
            reasons.append("no native kernel was called")
        return "; ".join(reasons)


def _native_calls() -> int:
    return sum(row["calls"] for op in backend.ops() for row in backend.implementations(op))


def errors(results: Tensors, exact: Tensors) -> list[float]:
    """Largest absolute error of each result; infinite where shapes differ or a value is not finite."""
    if len(results) != len(exact):
        return [math.inf] * len(exact)
    found = []
    for result, truth in zip(results, exact):
        if result.shape != truth.shape:
            found.append(math.inf)
            continue
        error = (result.detach().double() - truth).abs().max().item() if truth.numel() else 0.0
        found.append(error if math.isfinite(error) else math.inf)
    return found


def schedule(rounds: dict[str, int]) -> list[str]:
    """The order of samples: round-robin, each round starting one provider further, those with few rounds spread evenly.

    Example:
        >>> schedule({"a": 2, "b": 2})
        ['a', 'b', 'b', 'a']
    """
    names = list(rounds)
    most = max(rounds.values(), default=0)
    order = []
    for r in range(most):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            if (r + 1) * rounds[name] // most > r * rounds[name] // most:
                order.append(name)
    return order


def summary(samples: Sequence[float]) -> dict:
    """Median and interquartile range in ms."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {
        "median_ms": round(1e3 * quartiles[1], 6),
        "iqr_ms": round(1e3 * (quartiles[2] - quartiles[0]), 6),
        "samples": len(samples),
    }


def compare(providers: dict[str, dict]) -> dict:
    """Who is best on either side: ``{"llmfast": name, "peer": name, "ratio": peer's median over llmfast's}``."""
    timed = {name: p for name, p in providers.items() if "median_ms" in p}
    best = {}
    for side in (True, False):
        names = [name for name, p in timed.items() if p["ours"] == side]
        best[side] = min(names, key=lambda name: timed[name]["median_ms"], default=None)
    ratio = None
    if best[True] and best[False]:
        ratio = round(timed[best[False]]["median_ms"] / timed[best[True]]["median_ms"], 4)
    return {"llmfast": best[True], "peer": best[False], "ratio": ratio}


def measure(case: Case, limits: Limits | None, budget: Budget) -> dict:
    """Checks and times all providers of `case`; returns its part of a JSON row (see `rows`).

    A provider that fails does not raise: its entry says why. `limits` may be None: then no share of a limit is given.
    """
    contest = case.build()
    found = _check(case, contest, budget)
    if budget.timed:
        runnable = {
            n: p for n, p in contest.providers.items() if isinstance(p, Provider) and found[n]["status"] == "ok"
        }
        for name, samples in _time(runnable, found, budget).items():
            found[name].update(summary(samples))
    for provider in found.values():
        provider.pop("first_s", None)
        if limits and "median_ms" in provider:
            least, _ = limits.least_seconds(case.dtype, case.flops, case.moved)
            provider["share"] = round(1e3 * least / provider["median_ms"], 4)
    return {
        "kind": "op",
        "case": case.op,
        "direction": case.direction,
        "dtype": str(case.dtype).removeprefix("torch."),
        "dims": {**case.dims, **case.options},
        "flops": case.flops,
        "bytes": case.moved,
        "limit": limits.least_seconds(case.dtype, case.flops, case.moved)[1] if limits else None,
        "providers": found,
        "best": compare(found),
    }


def _check(case: Case, contest: Contest, budget: Budget) -> dict[str, dict]:
    """Calls every provider once. Peers come after the baseline and llmfast, as long as the case's time lasts."""
    exact = contest.oracle()
    start = perf_counter()
    order = sorted(contest.providers, key=lambda n: (n != contest.baseline, not _ours(contest.providers[n])))
    found: dict[str, dict] = {}
    base_errors: list[float] = []
    for name in order:
        provider = contest.providers[name]
        if isinstance(provider, str):
            found[name] = {"status": "not run", "note": provider, "ours": False}
        elif not provider.ours and name != contest.baseline and perf_counter() - start > budget.case:
            note = f"this case's {budget.case:g} s were used up"
            found[name] = {"status": "not run", "note": note, "ours": False}
        else:
            found[name], own = _check_provider(case, provider, exact, base_errors)
            base_errors = base_errors or own
    return {name: found[name] for name in contest.providers}


def _ours(provider: Provider | str) -> bool:
    return isinstance(provider, Provider) and provider.ours


def _check_provider(case: Case, provider: Provider, exact: Tensors, base: list[float]) -> tuple[dict, list[float]]:
    activity = Activity()
    try:
        with provider.forced(), memory.Peak(enabled=case.memory) as peak:
            start = perf_counter()
            results = provider.results()
            if provider.compiles:
                start = perf_counter()
                provider.run()
            first = perf_counter() - start
    except Exception as error:  # a peer's failure is a line in the table, whatever it is
        note = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        return {"status": "error", "note": note[:200], "ours": provider.ours}, []
    own = errors(results, exact)
    base = base or own  # the first provider is the baseline: only finiteness is asked of it
    scales = [max(1.0, t.abs().max().item()) if t.numel() else 1.0 for t in exact]
    right = all(e <= provider.slack * b + 1e-5 * s and math.isfinite(e) for e, b, s in zip(own, base, scales))
    worst = max(range(len(own)), key=lambda i: own[i] / (base[i] + 1e-5 * scales[i]))
    entry = {
        "status": "ok" if right else "wrong",
        "ours": provider.ours,
        "error": own[worst] if math.isfinite(own[worst]) else None,
        "baseline_error": base[worst] if math.isfinite(base[worst]) else None,
        "first_s": first,
    }
    if provider.ours:
        entry["fell_back"] = activity.fell_back()
    if peak.bytes is not None:
        entry["memory_mb"] = round(peak.bytes / 2**20, 1)
    return entry, own


def _time(providers: dict[str, Provider], found: dict[str, dict], budget: Budget) -> dict[str, list[float]]:
    """Samples of each provider, in seconds a call. A sample is a loop of about a millisecond where calls are short."""
    samples: dict[str, list[float]] = {name: [] for name in providers}
    repeats: dict[str, int] = {}
    rounds: dict[str, int] = {}
    for name, provider in providers.items():
        first = found[name]["first_s"]
        if first > budget.slow:
            samples[name].append(first)
            found[name]["note"] = "one call, not warmed up"
            continue
        with provider.forced():  # with the check: at least two calls before any that counts
            warm = min(_sample(provider, 1) for _ in range(1 if first > budget.slow / 4 else 3))
        repeats[name] = max(1, math.ceil(1e-3 / max(warm, 1e-7)))
        rounds[name] = budget.samples(warm * repeats[name])
    gc.collect()
    gc.disable()
    try:
        for name in schedule(rounds):
            with providers[name].forced():
                samples[name].append(_sample(providers[name], repeats[name]))
    finally:
        gc.enable()
    return samples


def _sample(provider: Provider, repeats: int) -> float:
    run = provider.run
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) / repeats
