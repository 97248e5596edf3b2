"""``llmfast bench``: llmfast against PyTorch and transformers on this machine, checked first, then timed in turns."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tyro.conf import Positional

from llmfast import backend
from llmfast.bench import cases, plots, rows, scale, tables
from llmfast.bench.harness import Budget, measure
from llmfast.bench.limits import Limits
from llmfast.bench.steps import StepCase, measure_step

MOST_SECONDS = 86400  # a day


@dataclass
class BenchConfig:
    """Compare llmfast's speed with PyTorch's and transformers' on this machine.

    Every result is checked against float64 (ops) or float32 losses (models) before it is timed.
    Example: llmfast bench op --quick --only linear,attention
    """

    what: Positional[Literal["all", "op", "model", "scale"]] = "all"
    """op: single operations; model: training steps, prefill and decoding of whole models; all: both; scale: training
    steps as models, sequences, batches and threads grow."""
    quick: bool = False
    """Fewer and smaller cases: under 3 minutes."""
    smoke: bool = False
    """Tiny cases, checked and not timed: under half a minute."""
    json: Path | None = None
    """Also write one JSON line a case to this file, which is replaced."""
    plot: Path | None = None
    """Also draw pictures (PNG) into this folder; needs matplotlib."""
    only: str | None = None
    """Only these ops, separated by commas: linear, ffn, attention, varlen_attention, add_layer_norm, add_rms_norm,
    linear_cross_entropy, AdamW. For scale, these sweeps: parameters, T (sequence length), B (batch), threads."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Only this dtype; default: float32 and bfloat16; for scale the one that multiplies fastest."""
    threads: int | None = None
    """Threads of llmfast and of its peers; default: torch's."""
    compile: bool = False
    """Also measure torch.compile (it compiles for half a minute a case, and needs a C++ compiler)."""
    malloc: bool = False
    """For models: also measure the peers with an allocator that keeps freed memory, as llmfast's training has it."""
    all_isas: bool = False
    """Also measure llmfast's kernels for lower instruction sets; a full run of single operations always does."""
    preset: str | None = None
    """For models: the shape (see llmfast.models.PRESETS); default: gpt2, and gpt-nano for small work."""
    batch: int | None = None
    """For models with --preset: sequences in a batch; default: 4."""
    sequence: int | None = None
    """For models with --preset: tokens in a sequence; default: the preset's context, at most 1024."""
    timeout: float = 90.0
    """For models: stop a provider that needs longer than this for a step, in seconds."""

    def __post_init__(self) -> None:
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("plot: needs matplotlib: pip install 'llmfast[plot]'")
        backend.check_threads(self.threads)
        if not 0 < self.timeout <= MOST_SECONDS:
            raise ValueError(
                f"timeout: got {self.timeout}, expected a positive number of seconds, at most {MOST_SECONDS}"
            )
        for name in ("batch", "sequence"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected a positive number")
        if self.json is not None and self.json.is_dir():
            raise ValueError(f"json: got the folder {str(self.json)!r}, expected a file")
        if self.plot is not None and self.plot.exists() and not self.plot.is_dir():
            raise ValueError(f"plot: got the file {str(self.plot)!r}, expected a folder")
        if self.preset is None and (self.batch or self.sequence):
            raise ValueError("batch, sequence: got a size without --preset, expected both")

    @property
    def command(self) -> str:
        """The command line that asks for this."""
        words = ["llmfast", "bench", self.what]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                flag = "--" + field.name.replace("_", "-")
                words += [flag] if value is True else [flag, str(value)]
        return shlex.join(words)

    @property
    def dtypes(self) -> list[str]:
        return [self.dtype] if self.dtype else ["float32", "bfloat16"]


OP_BUDGETS = {"full": Budget(), "quick": Budget(seconds=0.5, slow=1.0, case=6.0), "smoke": Budget(timed=False)}
STEP_BUDGETS = {
    "full": Budget(seconds=10.0, rounds=(3, 40), slow=60.0),
    "quick": Budget(seconds=1.5, rounds=(3, 20), slow=5.0),
    "smoke": Budget(timed=False),
}

SCALE_BUDGETS = {
    "full": Budget(seconds=5.0, rounds=(3, 20), slow=30.0),
    "quick": Budget(seconds=1.0, rounds=(3, 10), slow=3.0),
    "smoke": Budget(timed=False),
}


def main(config: BenchConfig) -> int:
    """Runs the suite; returns 1 if llmfast is wrong or fails anywhere."""
    threads = rows.torch_threads(config.threads)
    console = Console(stderr=True)
    size = "smoke" if config.smoke else "quick" if config.quick else "full"
    jobs = list(_jobs(config, size, threads))
    start = time.perf_counter()

    limits = None
    if not config.smoke:
        console.print("measuring this machine's limits")
        dtypes = [torch.float32, *(getattr(torch, dtype) for dtype in config.dtypes)]
        limits = Limits.measure(dtypes, seconds=0.1 if config.quick else 0.3)
    shared = rows.context(config.command, limits, threads)
    console.print(tables.headline(shared), highlight=False, soft_wrap=True)
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text("")

    found = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for label, job in jobs:
            progress.update(task, description=label)
            row = {**shared, **job(limits, lambda text: progress.update(task, description=text))}
            found.append(row)
            if config.json:
                rows.append(config.json, row)
            progress.advance(task)
            console.print("  ".join(tables.cells(row)), highlight=False, soft_wrap=True)

    _show(found, size, time.perf_counter() - start)
    if config.plot and not config.smoke:
        for path in plots.write(found, config.plot):
            console.print(f"wrote {path}", highlight=False)
    wrong = tables.problems(found)
    for line in wrong:
        console.print(f"[red]wrong:[/red] {line}", highlight=False)
    return int(bool(wrong))


def _show(found: list[dict], size: str, seconds: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for kind, title in (("op", "operations"), ("model", "models"), ("scale", "training steps as scale grows")):
        part = [row for row in found if row["kind"] == kind]
        if part:
            console.print(tables.terminal(part, title))
    for line in tables.trend_lines([row for row in found if row["kind"] == "scale"]):
        console.print(line, highlight=False, soft_wrap=True)
    checked = sum(p["status"] == "ok" for row in found for p in row["providers"].values() if p["ours"])
    if size == "smoke":
        console.print(f"{checked} results of llmfast checked, nothing timed, in {seconds:.0f} s")
    else:
        console.print(
            "median ± half the interquartile range; ratio above 1: llmfast is faster than the best of the others; "
            f"of limit, MFU: share of what this machine can do at most; ∝ x^a: fitted power law. {seconds:.0f} s"
        )


Job = Callable[[Limits | None, Callable[[str], None]], dict]


def _jobs(config: BenchConfig, size: str, threads: int) -> Iterable[tuple[str, Job]]:
    """Label and measurement of every case. Models come first: a run that is cut short has what takes longest."""
    if config.what in ("all", "model"):
        for case in _step_cases(config, size):

            def measure_model(limits, progress, case=case):
                return measure_step(case, limits, STEP_BUDGETS[size], threads, config.timeout, progress)

            yield case.label, measure_model
    if config.what == "scale":
        dtype = config.dtype or backend.fastest_dtype()
        for point in scale.points(size, dtype, threads, config.compile, _names(config.only)):

            def measure_scale(limits, progress, point=point):
                return scale.measure_point(point, limits, SCALE_BUDGETS[size], config.timeout, progress)

            yield point.label, measure_scale
    if config.what in ("all", "op"):
        options = cases.Options(size, config.compile, config.all_isas or size == "full")
        for case in cases.cases(options, _names(config.only), [getattr(torch, dtype) for dtype in config.dtypes]):
            yield case.label, lambda limits, progress, case=case: measure(case, limits, OP_BUDGETS[size])


def _names(only: str | None) -> list[str] | None:
    return [name.strip() for name in only.split(",")] if only else None


def _step_cases(config: BenchConfig, size: str) -> list[StepCase]:
    from llmfast.models import PRESETS

    if config.preset is not None:
        if config.preset not in PRESETS:
            raise ValueError(f"preset: got {config.preset!r}, expected one of {', '.join(PRESETS)}")
        shape, batch = PRESETS[config.preset], config.batch or 4
        sequence = config.sequence or min(1024, shape.context)
        step = f"batch: got {batch}, and a step of {config.preset} over that many sequences takes"
        backend.check_memory(step, shape.activation_bytes(batch * sequence))
        sizes = [(config.preset, dtype, batch, sequence) for dtype in config.dtypes]
    elif size == "full":
        sizes = [("gpt2", "bfloat16", 4, 1024), ("gpt2", "float32", 1, 512), ("gpt-nano", "float32", 12, 64)]
    elif size == "quick":
        sizes = [("gpt-micro", "float32", 4, 128), ("gpt-micro", "bfloat16", 4, 128)]
    else:
        sizes = [("gpt-nano", "float32", 2, 32), ("llama-nano", "bfloat16", 2, 32)]
    common = dict(compile=config.compile, malloc=config.malloc)
    found = [StepCase(*s, **common) for s in sizes if s[1] in config.dtypes]
    for preset, dtype in dict.fromkeys((case.preset, case.dtype) for case in found):
        if size == "quick" and dtype != found[0].dtype:
            continue
        T, context = config.sequence or (32 if size == "smoke" else 1024), PRESETS[preset].context
        found.append(StepCase(preset, dtype, 1, min(T, context), task="prefill", **common))
        for B in (1, 8) if size == "full" else (1,):
            found.append(StepCase(preset, dtype, B, min(T, context - 1), task="decode", **common))
    return found
