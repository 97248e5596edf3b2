"""``llmfast demo``: a tokenizer, a small GPT and its samples made on this machine in minutes, and how fast it went."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
import signal
import time
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from llmfast import backend
from llmfast.cli import demo_report
from llmfast.cli.demo_peer import Comparison, compare_steps, llmfast_step
from llmfast.data import Corpus, Dataset, build_tokenizer, open_corpus, prepare
from llmfast.generate import Sampling, stream
from llmfast.models import GPT
from llmfast.train import PretrainConfig, PretrainResult, pretrain, read_metrics
from llmfast.train.progress import Display

__all__ = ["DemoConfig", "main"]

TEXT_BYTES = 10_000_000
LEAST_TEXT_BYTES = 200_000  # so that a tenth of it, for validation, is longer than a sequence
LEFT_OUT = {"encodings", "pydoc_data"}  # tables, not code
# No space at the end: the tokenizer puts it before the word that follows.
PROMPTS = ("def __init__(self,", "class Reader:")
COMPARED_STEPS = 9
LATEST = 1.4  # times the training time that was planned: then it is ended
TRAINING_SHARE = 0.6  # of the time; the rest is for preparing, validation, samples and the comparison


@dataclass(frozen=True)
class Shape:
    """A model the demo may train: `gpt-micro` with other sizes, its batch, and its peak learning rate."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    lr: float


SHAPES = (
    Shape(width=64, layers=2, heads=2, context=128, batch=4, lr=4e-3),
    Shape(width=96, layers=3, heads=3, context=128, batch=4, lr=3e-3),
    Shape(width=128, layers=4, heads=4, context=128, batch=4, lr=3e-3),
    Shape(width=192, layers=4, heads=4, context=256, batch=4, lr=2e-3),
    Shape(width=256, layers=6, heads=8, context=256, batch=8, lr=2e-3),
    Shape(width=384, layers=6, heads=6, context=256, batch=16, lr=1.5e-3),
    Shape(width=512, layers=8, heads=8, context=256, batch=16, lr=1e-3),
)
# Measured at 5e12 FLOPs, about what 2 cores with AVX2 do in the default's time: bits per byte were 1.86 for width 64
# (6 tokens a parameter, batches of 512 tokens), 1.92 for width 96 (1.5), and 2.06 for width 128 (0.5, batches of 256).
TOKENS_PER_PARAMETER = 4.0


@dataclass
class DemoConfig:
    """Train a tokenizer and a small GPT on Python's standard library, sample from it, and compare speed with PyTorch.

    The model is chosen so that it fits the time. Everything is left in a folder, with a report for the browser.
    """

    minutes: float = 3.0
    """About how long all of it may take."""
    out: str | None = None
    """Folder to make; default: llmfast-demo, or the next free llmfast-demo-2, -3, ..."""
    seed: int = 1337
    """Of the weights, the order of the data, and the samples."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU, where there is one and llmfast was built with kernels for it."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: got {self.minutes}, expected a positive number")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected a number of 64 bits")


def main(config: DemoConfig) -> int:
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    out = _free_folder(config.out)
    device = backend.choose_device(config.device)
    dtype = getattr(torch, backend.fastest_dtype(device))

    _headline(console, 1, "this machine")
    machine = _machine(device)
    console.print(", ".join(value for _, value in machine), markup=False)

    _headline(console, 2, "a tokenizer and training data, from Python's standard library")
    dataset = _prepare(config, out, Display(console))
    console.print(
        f"{dataset.vocab_size:,} tokens of vocabulary, {dataset.train.bytes_per_token:.2f} bytes each on average; "
        f"{len(dataset.train):,} tokens of text for training, {len(dataset.val):,} for validation"
    )

    _headline(console, 3, "training")
    total = 60 * config.minutes
    left = total - (time.perf_counter() - started)
    seconds = max(1.0, min(TRAINING_SHARE * total, 0.75 * left))
    console.print(f"choosing a model that can learn something in {seconds:.0f} seconds ...")
    plan = _plan(config, out, dataset, dtype, seconds)
    deadline = _Deadline(LATEST * seconds)
    result = pretrain(plan, console=console, callback=deadline)
    if result.signal and not deadline.passed:
        return 128 + result.signal
    if deadline.passed:
        console.print("this machine became slower than it was when the number of steps was chosen; going on from here")

    _headline(console, 4, "samples")
    samples = [_sample(console, result, prompt, config.seed + i) for i, prompt in enumerate(PROMPTS)]

    _headline(console, 5, "speed of a training step, against the same model in plain PyTorch")
    comparison = _compare(console, plan, result, dtype)

    _headline(console, 6, "what is left")
    _finish(console, out, plan, result, samples, comparison, machine, time.perf_counter() - started)
    return 0


class _Deadline:
    """Ends training early on a machine that became slower than it was when the number of steps was chosen.

    Asks for the end as Ctrl-C does, so that the loop finishes its step and saves a checkpoint.
    """

    def __init__(self, seconds: float) -> None:
        self.at = time.perf_counter() + seconds
        self.passed = False

    def __call__(self, record: dict) -> None:
        if not self.passed and time.perf_counter() > self.at:
            self.passed = True
            signal.raise_signal(signal.SIGINT)


def _headline(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/6  {text}[/bold]")


def _free_folder(out: str | None) -> Path:
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"out: {out!r} exists and is not an empty folder, expected a new one")
        return folder
    number = 1
    while (folder := Path("llmfast-demo" if number == 1 else f"llmfast-demo-{number}")).exists():
        number += 1
    return folder


def _machine(device: torch.device) -> list[tuple[str, str]]:
    info = backend.info()
    gpu = [("GPU", torch.cuda.get_device_name(device))] if device.type == "cuda" else []
    return [
        *gpu,
        ("processor", info["cpu"]),
        ("kernels", f"{info['isa']} kernels"),
        ("threads", f"{info['threads']} thread{'s' if info['threads'] > 1 else ''}"),
        ("versions", f"llmfast {info['llmfast']}, torch {info['torch']}, Python {info['python']}"),
    ]


def _prepare(config: DemoConfig, out: Path, display: Display) -> Dataset:
    """Tokenised text in ``OUT/dataset``: less of it, and a smaller vocabulary, when there is little time."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage != "learning merges":  # reported once it is over, and not in bytes
            display.stage(stage, done, total)

    share = min(1.0, config.minutes / DemoConfig.minutes)
    library = open_corpus("stdlib")
    files = sorted(
        (file for file in library.files if not LEFT_OUT.intersection(file.parts)),
        # a mixture, the same on every machine
        key=lambda file: hashlib.blake2b("/".join(file.parts[-2:]).encode()).digest(),
    )
    sizes = list(accumulate(file.stat().st_size for file in files))
    count = max(1, bisect_right(sizes, max(share * TEXT_BYTES, LEAST_TEXT_BYTES)))
    corpus = Corpus(library.name, sorted(files[:count]))
    tokenizer = build_tokenizer("bpe", corpus, 4096 if share > 0.3 else 1024, progress)
    dataset = prepare(corpus, tokenizer, out / "dataset", progress=progress)
    display.close()
    return dataset


def _plan(config: DemoConfig, out: Path, dataset: Dataset, dtype: torch.dtype, seconds: float) -> PretrainConfig:
    """The largest model that still sees enough tokens in `seconds`, and as many steps as fit."""
    chosen, steps = None, 0
    for shape in SHAPES:
        plan = _pretrain_config(config, out, dataset, dtype, shape)
        step_seconds = _step_seconds(plan, dataset.vocab_size, dtype, seconds / 50)
        tokens = plan.tokens_per_step * seconds / step_seconds
        if chosen and tokens < TOKENS_PER_PARAMETER * plan.model_config(dataset.vocab_size).parameters():
            break
        chosen, steps = plan, max(10, int(seconds / step_seconds))
    every = max(1, math.ceil(steps / 4))
    return dataclasses.replace(
        chosen,
        steps=steps,
        warmup=max(1, steps // 20),
        val_every=every,
        val_batches=max(2, min(20, steps // 20)),
        log_every=max(1, steps // 200),
    )


def _pretrain_config(
    config: DemoConfig, out: Path, dataset: Dataset, dtype: torch.dtype, shape: Shape
) -> PretrainConfig:
    return PretrainConfig(
        out=str(out),
        data=str(dataset.folder),
        preset="gpt-micro",
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        context=shape.context,
        batch_size=shape.batch,
        lr=shape.lr,
        dtype=str(dtype).removeprefix("torch."),
        device=config.device,
        seed=config.seed,
        sample_every=0,
    )


def _step_seconds(plan: PretrainConfig, vocab_size: int, dtype: torch.dtype, seconds: float) -> float:
    """A typical training step: the median over about `seconds`, at least 3 steps, after one to warm up."""
    model = GPT(plan.model_config(vocab_size)).to(backend.choose_device(plan.device), dtype)
    step = llmfast_step(model, *_random_batch(plan, vocab_size))
    step()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def _random_batch(plan: PretrainConfig, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(vocab_size, (plan.batch_size, plan.sequence + 1), generator=generator)
    ids = ids.to(backend.choose_device(plan.device))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _sample(console: Console, result: PretrainResult, prompt: str, seed: int) -> tuple[str, str]:
    room = result.model.config.context - len(result.tokenizer.encode(prompt))
    pieces = stream(
        result.model,
        result.tokenizer,
        prompt,
        max_new_tokens=min(150, room),
        sampling=Sampling(temperature=0.7, top_k=50),
        seed=seed,
    )
    console.print(prompt, end="", markup=False, style="bold blue")
    text = ""
    for piece in pieces:
        console.print(piece, end="", markup=False)
        text += piece
    console.print("\n")
    return prompt, text


def _compare(console: Console, plan: PretrainConfig, result: PretrainResult, dtype: torch.dtype) -> Comparison:
    console.print(f"timing {COMPARED_STEPS} steps of each, in turns ...")
    config = result.model.config
    comparison = compare_steps(config, dtype, *_random_batch(plan, config.vocab_size), rounds=COMPARED_STEPS)
    header, *rows = demo_report.comparison_rows(comparison)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(demo_report.comparison_note(comparison), markup=False)
    return comparison


def _finish(
    console: Console,
    out: Path,
    plan: PretrainConfig,
    result: PretrainResult,
    samples: list[tuple[str, str]],
    comparison: Comparison,
    machine: list[tuple[str, str]],
    seconds: float,
) -> None:
    records = list(read_metrics(out / "metrics.jsonl"))
    losses = {
        kind: [(record["step"], record["loss"]) for record in records if record["kind"] == kind]
        for kind in ("train", "val")
    }
    curve = demo_report.loss_curve(losses["train"], losses["val"], plan.tokens_per_step)
    (out / "loss.svg").write_text(curve, encoding="utf-8")
    model = result.model.config
    summary = (
        f"A GPT of {model.parameters() / 1e6:.2f} million parameters ({model.layers} layers, width {model.width}, "
        f"context {model.context}, vocabulary {model.vocab_size:,}), trained in {result.seconds:.0f} seconds on "
        f"{result.step * plan.tokens_per_step:,} tokens of Python's standard library: validation loss "
        f"{losses['val'][0][1]:.2f} before, {result.val_loss:.2f} after, {result.bits_per_byte:.2f} bits per byte."
    )
    folder = shlex.quote(str(out))
    commands = (
        f'llmfast generate {folder} --prompt "def main("',
        f"llmfast pretrain --resume {folder} --steps {2 * plan.steps} --schedule-steps {plan.steps}",
    )
    report = out / "report.html"
    demo_report.write_report(
        report,
        title="llmfast demo",
        summary=summary,
        curve=curve,
        samples=samples,
        comparison=comparison,
        machine=[*machine, ("date", time.strftime("%Y-%m-%d"))],
        commands=commands,
    )
    console.print(summary, markup=False)
    console.print(f"All of it took {seconds:.0f} seconds. Report, for a browser:")
    console.print(f"  {report.resolve()}", markup=False)
    console.print("Go on with:")
    for command in commands:
        console.print(f"  {command}", markup=False)
