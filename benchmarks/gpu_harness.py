"""How `gpu_ops.py` and `gpu_model.py` check, time and report on a GPU.

Correctness first, by the error rule against float64; then providers take turns, timed by CUDA events on sets of inputs
that together exceed the L2 cache. The device is kept busy while a sample's calls are enqueued, so that the events see
its time and not the host's. Shares are of limits measured in the same run: a device copy, and torch's product of two
8192 x 8192 bfloat16 matrices.

A kernel that hangs or ruins the context takes the process down; `Progress` lets the next one go on with the next case.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmfast import backend
from llmfast.bench import rows
from llmfast.bench.harness import compare, errors, schedule, summary

BF16 = torch.bfloat16
L2_BYTES = 256 << 20
MOST_ROUNDS, FEWEST_ROUNDS, CALLS, WARM_ROUNDS = 15, 5, 4, 2
SECONDS = 0.5  # of timing, a provider and a case
CASE_LIMIT = float(os.environ.get("LLMFAST_GPU_TEST_LIMIT", "60"))

Tensors = tuple[torch.Tensor, ...]
Prepare = Callable[[Tensors], Callable[[], Tensors]]


def forward(function: Callable[..., Tensors]) -> Prepare:
    def prepare(inputs: Tensors):
        @torch.no_grad()
        def call():
            return function(*inputs)

        return call

    return prepare


def _with_gradients(function, inputs: Tensors, differentiable: int):
    leaves = [t.detach().requires_grad_() for t in inputs[:differentiable]]
    outputs = function(*leaves, *inputs[differentiable:])
    generator = torch.Generator("cuda").manual_seed(1)
    # The same for each batch and head, so that a part of them gets what it gets in the whole; exact in all dtypes.
    pattern = [torch.randn(o.shape[-2:], generator=generator, device="cuda", dtype=BF16) for o in outputs]
    grads = [g.to(o.dtype).expand(o.shape).contiguous() for g, o in zip(pattern, outputs)]
    return leaves, outputs, grads


def backward(function: Callable[..., Tensors], differentiable: int = 99) -> Prepare:
    """The backward pass alone, on a graph that is kept."""

    def prepare(inputs: Tensors):
        leaves, outputs, grads = _with_gradients(function, inputs, differentiable)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return prepare


def forward_backward(function: Callable[..., Tensors], differentiable: int = 99) -> Prepare:
    def prepare(inputs: Tensors):
        leaves, outputs, grads = _with_gradients(function, inputs, differentiable)
        del outputs

        def call():
            outputs = function(*leaves, *inputs[differentiable:])
            return *outputs, *torch.autograd.grad(outputs, leaves, grads)

        return call

    return prepare


@dataclass(frozen=True)
class Case:
    """`run[name](inputs)` prepares a call that gives tensors; the first provider besides llmfast is the baseline of the
    error rule. `exact` is the same in float64; `pick` cuts a result down to what `exact` computes of large problems."""

    op: str
    direction: str
    dims: dict[str, int]
    inputs: Callable[[], Tensors]
    run: dict[str, Prepare]
    exact: Prepare | None
    moved: float = 0.0
    flops: float = 0.0
    pick: Callable[[Tensors], Tensors] = lambda tensors: tensors

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} " + " ".join(f"{k}{v}" for k, v in self.dims.items())


def random(*shape: int, dtype=BF16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


# ---- timing -----------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], calls: int = CALLS, head_start: float = 0.0) -> float:
    """A call's time on the device. `head_start` seconds of waiting kernel come before, for the host to run ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if head_start:
        torch.cuda._sleep(int(head_start * 1.9e9))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@functools.cache
def limits() -> dict[str, float]:
    a = torch.randn(8192, 8192, dtype=BF16, device="cuda")
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    seconds(lambda: a @ a.t())
    return {
        "copy_bytes_per_s": 2 * 4 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(5)),
        "product_flops_per_s": 2 * 8192**3 / min(seconds(lambda: a @ a.t()) for _ in range(5)),
    }


def _input_sets(case: Case, first: Tensors) -> list[Tensors]:
    size = max(1, sum(t.numel() * t.element_size() for t in first))
    return [first, *(case.inputs() for _ in range(min(8, int(L2_BYTES // size))))]


def _checked(case: Case, first: Tensors) -> tuple[dict[str, dict], dict[str, Callable]]:
    """Entries of all providers, and the calls of those that run. The baseline's error comes first."""
    found, calls, peer, exact = {}, {}, None, None
    if case.exact is not None:
        wide = tuple(t.detach().double() if t.is_floating_point() else t for t in case.pick(first))
        exact = tuple(t.double() for t in case.exact(wide)())
        del wide
    for name in [n for n in case.run if n != "llmfast"] + ["llmfast"]:
        before, ours = backend.fallbacks(), name == "llmfast"
        try:
            calls[name] = case.run[name](first)
            results = calls[name]()
            error = [] if exact is None else errors(case.pick(results), exact)
            torch.cuda.synchronize()
            del results
        except Exception as problem:  # a peer that this GPU or this torch does not have
            calls.pop(name, None)
            status = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
            found[name] = {"status": status, "ours": ours}
            torch.cuda.synchronize()  # does the context still work? If not, the process ends here
            continue
        if peer is None:  # without a baseline, what bfloat16 allows
            peer = error if not ours else [0.01 * t.abs().max().item() for t in exact or ()]
        allowed = [2 * p + 1e-5 * max(1.0, t.abs().max().item()) for p, t in zip(peer, exact or ())]
        fine = all(e <= a for e, a in zip(error, allowed))
        found[name] = {"status": "ok" if fine else "wrong", "errors": error, "ours": ours}
        found[name]["fell_back"] = backend.fallbacks() != before
        if not ours and not fine:
            found[name]["status"] = "ok"  # a peer's rounding is its own business
    return found, calls


def measured(case: Case, timed: bool = True) -> dict:
    first, limit = case.inputs(), limits()
    found, calls = _checked(case, first)
    good = [name for name in case.run if name in calls and found[name]["status"] in ("ok", "wrong")]
    if timed and good:
        for name, samples in _sampled(case, first, {name: calls[name] for name in good}).items():
            entry = found[name]
            entry.update(summary(samples))
            s = entry["median_ms"] / 1e3
            if case.flops:
                entry["tflops"] = round(case.flops / s / 1e12, 2)
            if case.moved:
                entry["gb_per_s"] = round(case.moved / s / 1e9, 1)
            least = max(case.moved / limit["copy_bytes_per_s"], case.flops / limit["product_flops_per_s"])
            entry["share"] = round(least / s, 4)
    return {
        "case": case.op,
        "direction": case.direction,
        "dtype": "bfloat16",
        "dims": case.dims,
        "providers": found,
        "best": compare({name: e for name, e in found.items() if e["status"] == "ok"}),
    }


def _sampled(case: Case, first: Tensors, calls: dict[str, Callable]) -> dict[str, list[float]]:
    sets = _input_sets(case, first)
    prepared = {name: [call, *(case.run[name](s) for s in sets[1:])] for name, call in calls.items()}
    rounds, head_start = {}, {}
    for name, variants in prepared.items():
        for call in variants:
            call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for call in variants[:CALLS]:
            call()
        host = time.perf_counter() - begun
        torch.cuda.synchronize()
        each = (time.perf_counter() - begun) / min(CALLS, len(variants))
        rounds[name] = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / (CALLS * each)))) + WARM_ROUNDS
        # Twice the host's time: where the queue was full, that was the device's.
        head_start[name] = min(2 * host * CALLS / min(CALLS, len(variants)), 0.002)
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    for turn, name in enumerate(schedule(rounds)):
        variants = prepared[name]
        calls_left = iter([variants[(turn + i) % len(variants)] for i in range(CALLS)])
        samples[name].append(seconds(lambda calls_left=calls_left: next(calls_left)(), CALLS, head_start[name]))
    return {name: times[WARM_ROUNDS:] for name, times in samples.items()}


# ---- runs -------------------------------------------------------------------------------------------------------------


class Progress:
    """What has been started, in the file that LLMFAST_GPU_PROGRESS names, so that a process that dies can be started again
    and goes on behind the case that killed it. Each case has CASE_LIMIT seconds."""

    def __init__(self) -> None:
        name = os.environ.get("LLMFAST_GPU_PROGRESS")
        self.path = Path(name) if name else None
        text = self.path.read_text() if self.path and self.path.exists() else ""
        self.seen = {line[6:] for line in text.splitlines() if line.startswith("start ")}

    def begin(self, name: str, limit: float = CASE_LIMIT) -> bool:
        """False for a case that an earlier process began."""
        if name in self.seen:
            return False
        self._write(f"start {name}")
        faulthandler.dump_traceback_later(limit, exit=True)
        return True

    def finish(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write("finished")

    def _write(self, line: str) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")


class Report:
    """Appends rows to FOLDER/gpu-<device>.jsonl and prints them."""

    def __init__(self, folder: str, command: str) -> None:
        device = torch.cuda.get_device_name()
        self.path = Path(folder) / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"
        limit = limits()
        self.shared = rows.context(command, None, torch.get_num_threads())
        about = {
            "kind": "gpu",
            "limits": limit,
            "cuda": torch.version.cuda,
            "device": backend.info()["cuda_devices"][:1],
        }
        self.shared |= about
        copy, product = limit["copy_bytes_per_s"] / 1e12, limit["product_flops_per_s"] / 1e12
        print(f"{device}: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s", flush=True)

    def add(self, row: dict) -> None:
        rows.append(self.path, {**self.shared, **row})
        dims = " ".join(f"{k}{v}" for k, v in row["dims"].items())
        parts = [_said(name, entry) for name, entry in row["providers"].items()]
        ratio = row["best"]["ratio"]
        print(f"{row['case']} {row['direction']} {dims}" + (f"  x{ratio:.2f}" if ratio else ""), flush=True)
        print("    " + "; ".join(parts), flush=True)


def _said(name: str, entry: dict) -> str:
    if "median_ms" not in entry:
        return f"{name} {entry['status'][:60]}"
    rate = (
        f"{entry['tflops']:.0f}T" if "tflops" in entry else f"{entry['gb_per_s']:.0f}G/s" if "gb_per_s" in entry else ""
    )
    if "tokens_per_s" in entry:
        rate += f" {entry['tokens_per_s']:,.0f} tokens/s"
    flags = (" WRONG " + json.dumps(entry.get("errors"))[:80] if entry["status"] != "ok" else "") + (
        " (fell back)" if entry.get("fell_back") else ""
    )
    return f"{name} {entry['median_ms']:.4g}ms {rate} {100 * entry.get('share', 0):.0f}%{flags}"
