"""A run before its first step: its folder, its pieces, and the state of a checkpoint put into them."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import llmfast
from llmfast import backend
from llmfast.data import Batch, BatchLoader, eval_batches, open_corpus
from llmfast.data.files import write_json
from llmfast.models import GPT
from llmfast.optim import AdamW
from llmfast.train.checkpoint import (
    check_identity,
    checkpoint_name,
    find_checkpoint,
    point,
    read_checkpoint,
    remove_leftovers,
    restore,
)
from llmfast.train.config import MODEL_FIELDS, PretrainConfig, read_config_file
from llmfast.train.data import TrainingData, training_data
from llmfast.train.metrics import MetricsLog
from llmfast.train.progress import Display
from llmfast.train.throughput import measure_peak_flops

__all__ = ["CONFIG_FILE", "ENVIRONMENT_FILE", "Run", "device_name", "open_run", "run_folder"]

CONFIG_FILE, ENVIRONMENT_FILE = "config.json", "environment.json"
_LEFTOVER = re.compile(r"\.(config\.json|environment\.json|metrics\.jsonl)\.\d+\.tmp")  # of a killed `atomic_file`


@dataclass
class Run:
    """The pieces of a run, and how far it is."""

    config: PretrainConfig
    folder: Path
    data: TrainingData
    model: GPT
    forward: Callable[..., torch.Tensor]
    optimizer: AdamW
    loader: BatchLoader
    val_batches: list[Batch]
    metrics: MetricsLog
    display: Display
    peak_flops: float
    identity: dict[str, Any]
    step: int = 0
    checkpoint: Path | None = None
    best: dict[str, Any] | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_step: int = -1
    started: float = 0.0  # time.perf_counter() at which a run without interruptions would have started
    training_seconds: float = 0.0
    trained_steps: int = 0

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    @property
    def tokens(self) -> int:
        return self.step * self.config.tokens_per_step

    @property
    def schedule(self) -> dict[str, Any]:
        """Arguments of `learning_rate`."""
        c = self.config
        times = {"warmup": c.warmup_steps, "total": c.total_schedule, "decay_fraction": c.decay_fraction}
        return {"schedule": c.schedule, "peak": c.lr, "floor": c.floor_lr, **times}

    @property
    def save_every(self) -> int:
        return self.config.val_every if self.config.save_every is None else self.config.save_every

    @property
    def sample_every(self) -> int:
        every = self.config.val_every if self.config.sample_every is None else self.config.sample_every
        return every if self.data.tokenizer else 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def throughput(self, steps: int, seconds: float) -> tuple[float, float]:
        """Tokens a second, and the share of the measured peak that they make (MFU)."""
        rate = steps * self.config.tokens_per_step / seconds if seconds > 0 else 0.0
        return rate, rate * self.model.config.flops_per_token(self.config.sequence) / self.peak_flops

    def bits_per_byte(self, loss: float | None) -> float | None:
        per_token = self.data.val_bytes_per_token
        return None if loss is None or not per_token else loss / math.log(2) / per_token


@contextlib.contextmanager
def open_run(
    config: PretrainConfig, display: Display, callback: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[Run]:
    """Hold the folder that `config` names and yield the run in it, new or as its checkpoint left it."""
    device = backend.choose_device(config.device)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=backend.fastest_dtype(device))
    _check_memory(config, device)
    folder = run_folder(config)
    begun = (folder / ENVIRONMENT_FILE).exists() or (folder / "checkpoints").is_dir()
    if config.resume is None or not begun:
        _refuse_other_content(folder)
    with _locked(folder), _threads(config.threads):
        checkpoint = _find_checkpoint(config, folder)
        remove_leftovers(folder)
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()
        run = _prepare(config, device, folder, checkpoint, display, callback)
        with run.metrics, _quiet_garbage_collector():
            yield run


def _check_memory(config: PretrainConfig, device: torch.device) -> None:
    """Refuses sizes of which not even the least that they need would fit."""
    model, tokens = config.model_config(1), config.batch_size * config.sequence
    sizes = [name for name in MODEL_FIELDS if getattr(config, name) is not None] or ["preset"]
    backend.check_memory(
        f"{', '.join(sizes)}: got a model of {model.parameters():,} parameters, whose training takes",
        model.training_bytes(),
        device,
    )
    backend.check_memory(
        f"batch_size: got {config.batch_size}, and a step over that many sequences of {config.sequence} tokens takes",
        model.activation_bytes(tokens),
        device,
    )
    backend.check_memory(
        f"grad_accumulation: got {config.grad_accumulation}, and the tokens of that many batches take",
        16 * tokens * config.grad_accumulation,
        device,
    )


def run_folder(config: PretrainConfig) -> Path:
    """Where the run lies: ``config.out``, or the run that ``config.resume`` names."""
    if config.resume in (None, "auto"):
        return Path(config.out)
    checkpoint = find_checkpoint(config.resume)
    if checkpoint is None:
        raise FileNotFoundError(f"resume: {config.resume!r} has no checkpoint yet; start it again with --resume auto")
    return checkpoint.absolute().parent.parent if checkpoint.parent == Path() else checkpoint.parent.parent


def _find_checkpoint(config: PretrainConfig, folder: Path) -> Path | None:
    if config.resume == "auto":
        return find_checkpoint(folder) if (folder / "checkpoints").is_dir() else None
    return find_checkpoint(config.resume) if config.resume else None


def _refuse_other_content(folder: Path) -> None:
    """A new run goes into an empty folder, or one with a dataset alone, which is what a run leaves that was refused or
    interrupted before its first step (`prepare` compares it with what is wanted)."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out: {str(folder)!r} is a file, expected a folder")
    content = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if content := [name for name in content if name not in ("dataset", ".lock") and not _LEFTOVER.fullmatch(name)]:
        raise FileExistsError(
            f"out: {str(folder)!r} is not empty (it holds {', '.join(content[:5])}). "
            "Continue a run that lies there with --resume auto, or choose another folder with --out"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder; the kernel lets go of it when the process dies, however it dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"out: another process is training in {str(folder)!r}") from None
        yield


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet_garbage_collector() -> Iterator[None]:
    """What exists now, torch's modules above all, is left out of collections during the loop."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _prepare(
    config: PretrainConfig,
    device: torch.device,
    folder: Path,
    checkpoint: Path | None,
    display: Display,
    callback: Callable[[dict[str, Any]], None] | None,
) -> Run:
    """Everything before the first step: data, model, optimiser, and the state of `checkpoint` in them."""
    backend.keep_freed_memory()
    state = read_checkpoint(checkpoint) if checkpoint else None
    resuming = state is not None and not _other_data(config, folder)
    data = training_data(config, folder, display.stage, resuming=resuming)
    if state:
        data.verify(display.stage)
    display.close()
    if data.tokenizer:
        data.tokenizer.encode(config.sample_prompt)  # a character it does not know must not end the run later
    identity = {**config.identity(), **data.identity()}
    if state:
        check_identity(checkpoint, state["run"], identity)
    dtype = getattr(torch, config.dtype)
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(data.vocab_size)).to(device)  # the same weights on every device
    optimizer = _optimizer(model, config)
    optimizer.round_parameters(dtype)
    if config.grad_accumulation > 1:
        for p in model.parameters():
            p.grad_dtype = torch.float32
    B, T, documents = config.batch_size, config.sequence, config.respect_documents
    loader = BatchLoader(data.train, B, T, seed=config.seed, mode=config.loader, respect_documents=documents)
    val_batches = []
    if data.val is not None and config.val_every:
        val_batches = list(eval_batches(data.val, B, T, config.val_batches, respect_documents=documents))
        val_batches = [batch.to(device) for batch in val_batches]
    if state:
        restore(checkpoint, state, model, optimizer)
        loader.load_state_dict(state["data"])
    environment = _write_description(config, folder)
    run = Run(
        config, folder, data, model, torch.compile(model) if config.torch_compile else model, optimizer, loader,
        val_batches, _open_metrics(config, folder, state, display, callback), display,
        measure_peak_flops(dtype, device=device), identity,
    )  # fmt: skip
    _describe(run, environment, state)
    if state:
        run.step, run.checkpoint, run.best = state["step"], checkpoint, state["best"]
        run.train_loss, run.val_loss, run.val_step = state["train_loss"], state["val_loss"], state["val_step"]
        point(folder, "latest", checkpoint.name)  # from here on, later checkpoints are another run's future
        if run.best:
            point(folder, "best", checkpoint_name(run.best["step"]))
    run.started = time.perf_counter() - (state["seconds"] if state else 0.0)
    return run


def _other_data(config: PretrainConfig, folder: Path) -> bool:
    """Whether a resumed run names its text in other words than it began with, so that the two must be compared. A text
    that is gone cannot be, and does not matter."""
    try:
        begun_with = read_config_file(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    names = ("data", "text_field", "separator", "val_fraction", "tokenizer", "vocab_size")
    if all(getattr(config, name) == begun_with.get(name) for name in names):
        return False
    try:
        open_corpus(config.data)
    except FileNotFoundError:
        return False
    except ValueError:
        pass  # shards, or no text, which `training_data` says
    return True


def device_name(device: torch.device) -> str:
    """What a checkpoint remembers of the hardware: the GPU's model, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _hardware(device: torch.device, environment: dict[str, Any]) -> str:
    if device.type == "cuda":
        return device_name(device)
    return f"{environment['cpu']}, {environment['isa']}, {environment['threads']} threads"


def _open_metrics(
    config: PretrainConfig,
    folder: Path,
    state: dict[str, Any] | None,
    display: Display,
    callback: Callable[[dict[str, Any]], None] | None,
) -> MetricsLog:
    """The log, cut after the step of the checkpoint: a new run has none, not even of step 0."""
    last_step = state["step"] if state else -1
    metrics = MetricsLog(folder, last_step=last_step, tensorboard=config.tensorboard, callback=callback)
    if state and metrics.records != state["metrics_records"]:
        display.line(
            f"metrics.jsonl has {metrics.records} records up to step {last_step}, the checkpoint counted "
            f"{state['metrics_records']}; the plot will have gaps",
            style="yellow",
        )
    return metrics


def _optimizer(model: GPT, config: PretrainConfig) -> AdamW:
    """Decays matrices, embeddings among them, but not norms and biases, as GPT-2's and nanoGPT's training do."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
    )  # fmt: skip


def _write_description(config: PretrainConfig, folder: Path) -> dict[str, Any]:
    """Write environment.json, whose presence says that a run began here and so comes before anything else, and
    config.json. Returns the environment."""
    environment = backend.info()
    write_json(folder / ENVIRONMENT_FILE, environment)
    written = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("config", "resume")}
    write_json(folder / CONFIG_FILE, {**written, "out": str(folder)})
    return environment


def _describe(run: Run, environment: dict[str, Any], state: dict[str, Any] | None) -> None:
    """Say what is about to happen."""
    config, data, display = run.config, run.data, run.display
    val = f", {len(data.val):,} for validation" if data.val else ""
    tokens = config.total_steps * config.tokens_per_step
    millions = run.model.config.parameters() / 1e6
    display.line(
        f"{millions:.2f}M parameters in {config.dtype}; {len(data.train):,} tokens of text{val}\n"
        f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens: {tokens:,} in all, "
        f"{tokens / len(data.train):.2f} epochs\n"
        f"{_hardware(run.device, environment)}; run in {run.folder}"
    )
    if state is None:
        return
    display.line(f"resuming after step {state['step']:,}")
    here = {"threads": environment["threads"], "isa": environment["isa"], "llmfast": llmfast.__version__}
    for name, value in {"device": device_name(run.device), **here}.items():
        if state.get(name, "cpu") != value:
            display.line(
                f"{name}: the checkpoint was written with {state.get(name, 'cpu')}, this is {value}; results will "
                "agree closely, but not bit for bit",
                style="yellow",
            )
