"""What the tests of `llmfast.train` share: a small text, a tiny configuration, and comparisons of finished runs."""

import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from llmfast.train import PretrainConfig, pretrain, read_metrics

WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
)


def write_text(folder: Path, documents: int = 1) -> Path:
    """About 12 kB of words in a random order that is always the same; documents end with a form feed."""
    words = random.Random(7)
    texts = [" ".join(words.choices(WORDS, k=3000 // documents)) for _ in range(documents)]
    path = folder / "input.txt"
    path.write_text("\f".join(texts))
    return path


def tiny_config(folder: Path, **changes) -> PretrainConfig:
    """A run of a second or two in ``folder/run`` (or the `out` given), one thread, every step recorded."""
    if not (folder / "input.txt").exists():
        write_text(folder)
    values = dict(
        data=str(folder / "input.txt"), tokenizer="char", out=str(folder / "run"), preset="gpt-nano", layers=2, heads=2,
        width=32, context=32, seq_len=32, batch_size=4, steps=20, warmup=3, lr=3e-3, val_every=5, val_batches=2,
        sample_every=0, log_every=1, threads=1, dtype="float32", device="cpu",
    )  # fmt: skip
    return PretrainConfig(**{**values, **changes})


def train(config: PretrainConfig, **options):
    """`pretrain`, silent, without the half second that measuring the peak takes, and without the plot."""
    with (
        patch("llmfast.train.run.measure_peak_flops", return_value=1e11),
        # As an object: before Python 3.11 the dotted name means the function that has the module's name.
        patch.object(sys.modules[pretrain.__module__], "plot_losses", return_value="not plotted"),
    ):
        return pretrain(config, console=Console(quiet=True), **options)


def tensors(result_or_folder) -> dict[str, torch.Tensor]:
    """Weights and optimiser state of a checkpoint."""
    folder = getattr(result_or_folder, "checkpoint", result_or_folder)
    optimizer = {f"optimizer.{name}": value for name, value in load_file(folder / "optimizer.safetensors").items()}
    return {**load_file(folder / "model.safetensors"), **optimizer}


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{name} differs"


def records(folder, kind=None) -> list[dict]:
    """Metrics without what depends on the clock."""
    timed = ("time", "tokens_per_s", "mfu")
    found = read_metrics(Path(folder) / "metrics.jsonl", kind)
    return [{name: value for name, value in record.items() if name not in timed} for record in found]


def start_script(script: str, folder: Path) -> subprocess.Popen:
    """A Python process that runs `script` in `folder` (not in a checkout, which would hide the installed package)."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, **pipes)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
