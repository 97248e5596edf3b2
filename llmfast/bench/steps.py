"""Training steps of whole models: llmfast and its peers, each in a process of its own, taking turns.

A process each, because only so is its peak memory its own, and because a peer that needs minutes for a step can be
stopped at a time limit. Idle processes wait on a pipe and take no processor time. Weights, batch, hyperparameters and
threads are the same; before anything is timed, the losses of the first steps are held against transformers in float32.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass

from llmfast.bench.harness import Budget, compare, schedule, summary
from llmfast.bench.limits import Limits
from llmfast.bench.worker import StepSpec, serve
from llmfast.models import PRESETS

__all__ = ["StepCase", "measure_step"]

STARTING, COMPILING = 120.0, 600.0  # seconds that imports and weights, and torch.compile, may take
COMPARED = 4  # losses
WARM_AT_ONCE = 10.0  # seconds: one step this long warms up all there is to warm up
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-3}  # of the loss, which starts near log(V)


@dataclass(frozen=True)
class StepCase:
    """A training step (forward, backward, AdamW) of a preset on B sequences of T tokens.

    Example:
        >>> StepCase("gpt2", "bfloat16", B=4, T=1024).label
        'training step gpt2 bfloat16 B=4 T=1024'
    """

    preset: str
    dtype: str
    B: int
    T: int
    compile: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: got {self.preset!r}, expected one of {', '.join(PRESETS)}")
        if not 1 < self.T <= PRESETS[self.preset].context:
            raise ValueError(f"T: got {self.T}, expected 2 to {PRESETS[self.preset].context} for {self.preset}")

    @property
    def label(self) -> str:
        return f"training step {self.preset} {self.dtype} B={self.B} T={self.T}"

    def providers(self, threads: int) -> dict[str, StepSpec | str]:
        """By name; a string says why one cannot run."""

        def spec(provider: str, dtype: str, compile: bool = False) -> StepSpec:
            return StepSpec(provider, self.preset, dtype, compile, self.B, self.T, threads)

        found: dict[str, StepSpec | str] = {
            "llmfast": spec("llmfast", self.dtype),
            "transformers float32": spec("transformers", "float32"),
        }
        if self.dtype != "float32":
            found[f"transformers {self.dtype} autocast"] = spec("transformers", self.dtype)
        found["transformers torch.compile"] = (
            spec("transformers", self.dtype, True) if self.compile else "not asked for (--compile)"
        )
        if importlib.util.find_spec("transformers") is None:
            found = {n: s if n == "llmfast" else "transformers is not installed" for n, s in found.items()}
        return found


class _Failed(Exception):
    """A provider cannot go on: (status, note)."""


class _Worker:
    def __init__(self, spec: StepSpec, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's state
        self.timeout = timeout
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, spec), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: str | None, extra: float = 0.0) -> dict:
        """The answer to `request` (None: to having been started); it may take `extra` seconds more than a step."""
        try:
            if request:
                self.connection.send(request)
            if not self.connection.poll(self.timeout + extra):
                raise _Failed("timeout", f"no answer within {self.timeout + extra:g} s")
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise _Failed("error", f"its process died (exit code {self.process.exitcode})") from None
        if "error" in answer:
            raise _Failed("error", answer["error"])
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def measure_step(
    case: StepCase,
    limits: Limits | None,
    budget: Budget,
    threads: int,
    timeout: float,
    progress: Callable[[str], None] = lambda text: None,
) -> dict:
    """Checks and times all providers; returns the case's part of a JSON row (see `rows`).

    Args:
        limits: None gives no share of a limit.
        budget: `seconds` and `rounds` as for ops; a first step slower than `slow` is its provider's only sample.
        timeout: seconds that a provider may take for a step before it is stopped.
    """
    found: dict[str, dict] = {}
    workers: dict[str, _Worker] = {}
    try:
        for name, spec in case.providers(threads).items():
            found[name] = {"ours": name == "llmfast"}
            if isinstance(spec, str):
                found[name].update(status="not run", note=spec)
                continue
            progress(f"{case.label}: {name}, first steps")
            _guard(found[name], workers, name, lambda s=spec, n=name: _start(n, s, workers, found[n], timeout, budget))
        _check_losses(found, TOLERANCE[case.dtype])
        if budget.timed:
            _time(case, found, workers, budget, progress)
        for name in list(workers):
            _guard(found[name], workers, name, lambda n=name: _finish(workers[n], found[n]))
    finally:
        for worker in workers.values():
            worker.close()
    return _row(case, found, limits)


def _guard(entry: dict, workers: dict[str, _Worker], name: str, action: Callable[[], None]) -> None:
    """Runs `action`; if it fails, the provider is out and its entry says why."""
    try:
        action()
    except _Failed as failure:
        entry["status"], entry["note"] = failure.args
        if name in workers:
            workers.pop(name).close()


def _start(name: str, spec: StepSpec, workers: dict, entry: dict, timeout: float, budget: Budget) -> None:
    """Two steps to warm up, or one if that is slow."""
    workers[name] = worker = _Worker(spec, timeout)
    worker.ask(None, STARTING)
    steps = [worker.ask("step", COMPILING if spec.compile else 0.0)]
    if spec.compile or steps[0]["seconds"] < min(WARM_AT_ONCE, budget.slow):
        steps.append(worker.ask("step"))
    entry.update(status="ok", losses=[s["loss"] for s in steps], warm_up_s=[round(s["seconds"], 4) for s in steps])


def _check_losses(found: dict[str, dict], tolerance: float) -> None:
    """Marks providers whose losses leave those of transformers in float32."""
    truth = found["transformers float32"].get("losses")
    for entry in found.values():
        if entry.get("status") != "ok":
            continue
        if truth is None:
            entry["note"] = "losses not checked: transformers did not run"
            continue
        entry["error"] = max(abs(a - b) for a, b in zip(entry["losses"], truth))
        if not entry["error"] <= tolerance:
            entry.update(status="wrong", note=f"a loss is off by {entry['error']:.2g}, allowed {tolerance:g}")


def _time(case: StepCase, found: dict, workers: dict, budget: Budget, progress: Callable[[str], None]) -> None:
    samples = {name: [] for name in workers if found[name]["status"] == "ok"}
    rounds = {}
    for name in samples:
        warm_up = found[name]["warm_up_s"]
        if warm_up[-1] > budget.slow:
            samples[name] = warm_up[-1:]
            found[name].setdefault("note", "one step, not warmed up")
        else:
            rounds[name] = budget.samples(warm_up[-1])
    order = schedule(rounds)
    for i, name in enumerate(order):
        if name in workers:
            progress(f"{case.label}: step {i + 1} of {len(order)}, {name}")
            _guard(found[name], workers, name, lambda n=name: _take(workers[n], samples[n], found[n]["losses"]))
    _check_losses(found, TOLERANCE[case.dtype])  # slow providers took one step before: now there are more
    for name, taken in samples.items():
        if taken and found[name]["status"] == "ok":
            found[name].update(summary(taken))


def _take(worker: _Worker, samples: list[float], losses: list[float]) -> None:
    answer = worker.ask("step")
    samples.append(answer["seconds"])
    if len(losses) < COMPARED:
        losses.append(answer["loss"])


def _finish(worker: _Worker, entry: dict) -> None:
    used = worker.ask("stop")
    if entry["ours"]:
        entry["fell_back"] = used["fell_back"]
    if used["peak_rss"]:
        entry["memory_mb"] = round(used["peak_rss"] / 2**20)


def _row(case: StepCase, found: dict[str, dict], limits: Limits | None) -> dict:
    config = PRESETS[case.preset]
    tokens = case.B * case.T
    flops = tokens * config.flops_per_token(case.T)
    for entry in found.values():
        if "median_ms" in entry:
            entry["tokens_per_s"] = round(1e3 * tokens / entry["median_ms"], 1)
            if limits:
                least, _ = limits.least_seconds(case.dtype, flops, 0)
                entry["share"] = round(1e3 * least / entry["median_ms"], 4)
    return {
        "kind": "model",
        "case": "training step",
        "direction": "step",
        "dtype": case.dtype,
        "dims": {"model": case.preset, "parameters": config.parameters(), "B": case.B, "T": case.T},
        "flops": flops,
        "bytes": None,
        "limit": "compute",
        "providers": found,
        "best": compare(found),
    }
