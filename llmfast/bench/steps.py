"""Whole models: training steps, prefill and decoding by llmfast and its peers, each in a process of its own, taking turns.

A process each, because only so is its peak memory its own, and because a peer that needs minutes for a step can be
stopped at a time limit. Idle processes wait on a pipe and take no processor time. Weights, batch, hyperparameters and
threads are the same; before anything is timed, the losses of the first steps (for inference: the loss of one token after
the prompt) are held against transformers in float32. Where not all of them fit into memory, they take turns in groups,
llmfast in each.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass

from llmfast.bench.harness import Budget, compare, schedule, summary
from llmfast.bench.limits import Limits
from llmfast.bench.memory import available
from llmfast.bench.worker import StepSpec, Task, serve
from llmfast.models import PRESETS, GPTConfig

__all__ = ["StepCase", "measure_step"]

STARTING, COMPILING = 120.0, 600.0  # seconds that imports and weights, and torch.compile, may take
COMPARED = 4  # losses
WARM_AT_ONCE = 10.0  # seconds: one step this long warms up all there is to warm up
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-3}  # of the loss, which starts near log(V)
ONE_TOKEN = 10.0  # times that for the loss of B tokens instead of B * T
# Takes seconds to import. Not transformers, which would count as llmfast's memory too; and not llmfast, because the search
# for it starts in the working directory, which may be a checkout that was never built.
PRELOAD = ["torch"]


@dataclass(frozen=True)
class StepCase:
    """A task of a model on B sequences of T tokens.

    Attributes:
        preset: the model's shape, by name in `llmfast.models.PRESETS`; or any name, with `config`.
        dtype: float32 or bfloat16.
        compile: also measure torch.compile of the peers.
        task: ``training step`` (forward, backward, AdamW); ``prefill`` (B prompts of T tokens into the key/value caches,
            logits of the last); ``decode`` (one token for each of B sequences, after T others; timed a few in a row).
        malloc: also measure the peers with freed memory kept by the allocator, as llmfast asks it to.
        config: the model's shape, where no preset has it.

    Example:
        >>> StepCase("gpt2", "bfloat16", B=4, T=1024).label
        'training step gpt2 bfloat16 B=4 T=1024'
    """

    preset: str
    dtype: str
    B: int
    T: int
    compile: bool = False
    task: Task = "training step"
    malloc: bool = False
    config: GPTConfig | None = None

    def __post_init__(self) -> None:
        if self.config is None and self.preset not in PRESETS:
            raise ValueError(f"preset: got {self.preset!r}, expected one of {', '.join(PRESETS)}")
        most = self.shape.context - (1 if self.task == "decode" else 0)
        if not 1 < self.T <= most:
            raise ValueError(f"T: got {self.T}, expected 2 to {most} for {self.preset}")

    @property
    def shape(self) -> GPTConfig:
        """With biases where GPT-2 has them, because transformers' has them always."""
        config = self.config or PRESETS[self.preset]
        return config.replace(bias=True) if config.norm == "layer_norm" else config

    @property
    def label(self) -> str:
        return f"{self.task} {self.preset} {self.dtype} B={self.B} T={self.T}"

    @property
    def tokens(self) -> int:
        """What a step works through."""
        return self.B if self.task == "decode" else self.B * self.T

    @property
    def flops(self) -> int:
        """Multiplies and adds of a step; inference needs the head for one position of a sequence only."""
        c = self.shape
        if self.task == "training step":
            return self.tokens * c.flops_per_token(self.T)
        head = 2 * c.vocab_size * c.width
        if self.task == "prefill":
            return self.tokens * (c.flops_per_token(self.T) // 3 - head) + self.B * head
        attention = c.layers * 4 * c.heads * c.D * (self.T + 1)
        return self.B * (2 * c.layers * c.block_matmul_parameters() + attention + head)

    @property
    def bytes(self) -> int | None:
        """What decoding must read: every weight once, and the keys and values of all sequences."""
        if self.task != "decode":
            return None
        c, width = self.shape, 4 if self.dtype == "float32" else 2
        return width * (c.parameters() + self.B * 2 * c.layers * c.Hkv * c.D * self.T)

    def providers(self, threads: int) -> dict[str, StepSpec | str]:
        """By name; a string says why one cannot run."""

        def spec(provider: str, dtype: str, compile: bool = False, malloc: bool = False) -> StepSpec:
            return StepSpec(provider, self.shape, dtype, compile, self.B, self.T, threads, self.task, malloc)

        narrow = f"transformers {self.dtype}" + (" autocast" if self.task == "training step" else "")
        peers: dict[str, StepSpec | str] = {"transformers float32": spec("transformers", "float32")}
        if self.dtype != "float32":
            peers[narrow] = spec("transformers", self.dtype)
        peers["transformers torch.compile"] = (
            spec("transformers", self.dtype, True) if self.compile else "not asked for (--compile)"
        )
        if self.malloc:
            tuned = {n: dataclasses.replace(s, malloc=True) for n, s in peers.items() if isinstance(s, StepSpec)}
            peers.update({f"{name}, tuned malloc": s for name, s in tuned.items()})
        if importlib.util.find_spec("transformers") is None:
            peers = dict.fromkeys(peers, "transformers is not installed")
        return {"llmfast": spec("llmfast", self.dtype), **peers}


def _fits(peaks: list[int], idle: list[int]) -> bool:
    """Whether memory suffices for one more process, somewhat larger than the largest of some whose bytes at most and between
    their steps are given: it may keep all of it, while any of them takes a step. Yes where that is unknown."""
    free = available()
    steps = max(peak - now for peak, now in zip(peaks, idle))
    return free is None or free > 1.25 * max(peaks) + steps


class _Failed(Exception):
    """A provider cannot go on: (status, note)."""


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Forks of a process that has imported everything and computed nothing: ready at once, without OpenMP's state."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class _Worker:
    def __init__(self, spec: StepSpec, timeout: float) -> None:
        context = _context()
        self.spec, self.timeout = spec, timeout
        self.peak_rss = self.rss = 0  # bytes, as of the last answer
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
            code = self.process.exitcode
            why = "killed, perhaps for want of memory" if code == -signal.SIGKILL else f"exit code {code}"
            raise _Failed("error", f"its process died ({why})") from None
        if "error" in answer:
            raise _Failed("error", answer["error"])
        self.peak_rss, self.rss = answer.get("peak_rss") or 0, answer.get("rss") or 0
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
    providers = case.providers(threads)
    match = _Match(case, budget, timeout, progress, {name: {"ours": name == "llmfast"} for name in providers})
    peers: dict[str, StepSpec] = {}
    for name, spec in providers.items():
        if isinstance(spec, str):
            match.found[name].update(status="not run", note=spec)
        elif name != "llmfast":
            peers[name] = spec
    while True:
        postponed = match.turns({"llmfast": providers["llmfast"], **peers})
        if not postponed:
            break
        peers = {name: peers[name] for name in postponed}
    for name, taken in match.samples.items():
        if taken and match.found[name]["status"] == "ok":
            match.found[name].update(summary(taken))
    return _row(case, match.found, limits)


@dataclass
class _Match:
    """A case's providers and what is known of each: `found`, as it goes into the row, and its samples in seconds."""

    case: StepCase
    budget: Budget
    timeout: float
    progress: Callable[[str], None]
    found: dict[str, dict]
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def turns(self, specs: dict[str, StepSpec]) -> list[str]:
        """Checks and times providers that take turns; returns peers for which the memory did not suffice beside the others.
        They get turns with llmfast, whose samples all count, when these have gone."""
        workers: dict[str, _Worker] = {}
        postponed: list[str] = []
        try:
            for name, spec in specs.items():  # all of them start at once: imports and weights take seconds
                workers[name] = _Worker(spec, self.timeout)
            self.progress(f"{self.case.label}: starting")
            for name in list(workers):
                self._guard(workers, name, lambda worker, entry: worker.ask(None, STARTING))
            peaks, idle = [], []  # bytes of peers at most, and now
            for name in list(workers):
                if peaks and not _fits(peaks, idle):
                    postponed.append(name)
                    workers.pop(name).close()
                    continue
                self.progress(f"{self.case.label}: {name}, first steps")
                self._guard(workers, name, lambda worker, entry: _warm_up(worker, entry, self.budget))
                if name in workers and not self.found[name]["ours"]:
                    peaks.append(workers[name].peak_rss)
                    idle.append(workers[name].rss)
            _check_losses(self.found, _tolerance(self.case))
            if self.budget.timed:
                self._time(workers)
            for name in list(workers):
                self._guard(workers, name, _finish)
        finally:
            for worker in workers.values():
                worker.close()
        return postponed

    def _guard(self, workers: dict[str, _Worker], name: str, action: Callable[[_Worker, dict], object]) -> None:
        """Does something with a provider; if it fails, the provider is out and its entry says why."""
        try:
            action(workers[name], self.found[name])
        except _Failed as failure:
            self.found[name]["status"], self.found[name]["note"] = failure.args
            workers.pop(name).close()

    def _time(self, workers: dict[str, _Worker]) -> None:
        """Adds to `samples`."""
        rounds = {}
        for name in workers:
            entry = self.found[name]
            if entry["status"] != "ok":
                continue
            taken = self.samples.setdefault(name, [])
            last = entry["warm_up_s"][-1]
            if last > self.budget.slow:
                taken.append(last)
                entry.setdefault("note", "one step, not warmed up")
            else:
                rounds[name] = self.budget.samples(last)
        order = schedule(rounds)
        for i, name in enumerate(order):
            if name in workers:
                self.progress(f"{self.case.label}: step {i + 1} of {len(order)}, {name}")
                taken = self.samples[name]
                self._guard(workers, name, lambda worker, entry, taken=taken: _take(worker, taken, entry["losses"]))
        _check_losses(self.found, _tolerance(self.case))  # slow providers took one step before: now there are more


def _warm_up(worker: _Worker, entry: dict, budget: Budget) -> None:
    """Two steps, or one if that is slow."""
    compile = worker.spec.compile
    steps = [worker.ask("step", COMPILING if compile else 0.0)]
    if compile or steps[0]["seconds"] < min(WARM_AT_ONCE, budget.slow):
        steps.append(worker.ask("step"))
    entry.update(status="ok", losses=[s["loss"] for s in steps], warm_up_s=[round(s["seconds"], 4) for s in steps])


def _tolerance(case: StepCase) -> float:
    return TOLERANCE[case.dtype] * (1.0 if case.task == "training step" else ONE_TOKEN)


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
    least, limit = limits.least_seconds(case.dtype, case.flops, 0) if limits else (None, "compute")
    if limits and case.bytes and case.bytes / limits.read > least:
        least, limit = case.bytes / limits.read, "read"
    for entry in found.values():
        if "median_ms" in entry:
            entry["tokens_per_s"] = round(1e3 * case.tokens / entry["median_ms"], 1)
            if least is not None:
                entry["share"] = round(1e3 * least / entry["median_ms"], 4)
    return {
        "kind": "model",
        "case": case.task,
        "direction": "step",
        "dtype": case.dtype,
        "dims": {"model": case.preset, "parameters": case.shape.parameters(), "B": case.B, "T": case.T},
        "flops": case.flops,
        "bytes": case.bytes,
        "limit": limit,
        "providers": found,
        "best": compare(found),
    }
