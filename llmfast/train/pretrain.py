"""Pre-training with the language-modelling objective: the loop, flat, from a `PretrainConfig` to a trained model.

One step: micro-batches forward and backward, norm of the gradient, one fused AdamW pass that clips as it reads. On
small models everything else counts: losses are plain floats, the display draws four times a second, nothing is synced
to the disk between checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import llmfast
from llmfast import backend
from llmfast.data import Batch, Tokenizer
from llmfast.data.files import fingerprint_of
from llmfast.data.loader import IGNORE
from llmfast.models import GPT
from llmfast.optim import clip_grad_norm
from llmfast.train.checkpoint import checkpoint_name, save_checkpoint
from llmfast.train.config import PretrainConfig
from llmfast.train.interrupt import StopRequest
from llmfast.train.metrics import plot_losses
from llmfast.train.progress import Display
from llmfast.train.run import Run, device_name, open_run
from llmfast.train.schedule import learning_rate

__all__ = ["NonFiniteError", "PretrainResult", "accumulate_gradients", "pretrain"]


class NonFiniteError(RuntimeError):
    """The loss or the gradient's norm is NaN or infinite; raised before the weights are touched by it."""


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to.

    `signal` is the signal's number if one ended the run early, else None. `tokens_per_s` and `mfu` are of all training
    steps of this process, without validation, samples and checkpoints. `val_loss` is the last one, in nats per token.
    """

    out_dir: Path
    checkpoint: Path
    step: int
    train_loss: float | None
    val_loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float
    mfu: float
    peak_flops: float
    seconds: float
    signal: int | None
    model: GPT = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)


def pretrain(
    config: PretrainConfig,
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
) -> PretrainResult:
    """Train a model as `config` says, in ``config.out``, and return what came of it.

    `callback` receives every record that goes into ``metrics.jsonl`` (see `MetricsLog`). `console` shows progress
    (``Console(quiet=True)``: nothing). Ctrl-C and SIGTERM end the run after the step, with a checkpoint; a second one
    ends it at once. On a GPU, or with a fixed number of threads, a run that is interrupted and resumed gives bit for bit
    what one without interruption does: kernels are asked to add in a fixed order.

    Raises:
        FileExistsError: ``config.out`` is not empty and this is no resumption.
        CheckpointError: the checkpoint is damaged or of another run.
        NonFiniteError: the loss or the gradient's norm became NaN or infinite.
        BlockingIOError: another process trains in this folder.
        ValueError, FileNotFoundError, ...: as `training_data` raises them.

    Example:
        >>> result = pretrain(PretrainConfig(data="input.txt", tokenizer="char", preset="gpt-nano", out="runs/nano"))
        >>> result.val_loss
        1.87
    """
    display = Display(console)
    with (
        closing(display),
        open_run(config, display, callback) as run,
        StopRequest() as stop,
        backend.deterministic_sums(),
    ):
        display.start(run.step, run.config.total_steps)
        _train(run, stop)
        display.close()
        _finish(run, stop)
        return _result(run, stop)


def _train(run: Run, stop: StopRequest) -> None:
    """Steps until the last one or a signal, with records, validation, samples and checkpoints in between."""
    config, display = run.config, run.display
    steps = config.total_steps
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    groups = run.optimizer.param_groups
    schedule, max_norm = run.schedule, config.clip or math.inf
    if run.step == 0 and run.checkpoint is None and run.val_batches:
        _validate(run)
    batches = (batch.to(run.device) for batch in run.loader)
    paused, begin, first = 0.0, time.perf_counter(), run.step
    logged = shown = (begin, first)
    while run.step < steps and not stop.signal:
        lr = learning_rate(run.step, **schedule)
        for group in groups:
            group["lr"] = lr
        losses = _accumulate(run.forward, batches, config.grad_accumulation)
        norm, scale = clip_grad_norm(parameters, max_norm)
        on_device = isinstance(scale, torch.Tensor)
        if on_device:  # the whole step is under way before anything is waited for; NaN as the scale leaves all as it is
            numbers = (norm, *(loss for _, loss in losses))
            run.optimizer.step(grad_scale=scale + sum(0.0 * number for number in numbers))
        loss, norm = _mean(losses), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _non_finite(run, loss, norm)
        if not on_device:
            run.optimizer.step(grad_scale=scale)
        for p in parameters:
            p.grad = None
        run.step += 1
        run.train_loss = loss

        step, clock = run.step, time.perf_counter()
        now = clock - paused
        if clock >= display.due or step == steps:
            rate, mfu = run.throughput(step - shown[1], now - shown[0])
            display.show(
                step, steps, f"loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {rate:,.0f} tok/s  MFU {mfu:.1%}"
            )
            shown = (now, step)
        if step % config.log_every == 0 or step == steps:
            rate, mfu = run.throughput(step - logged[1], now - logged[0])
            record = {"kind": "train", "step": step, "tokens": run.tokens, "loss": loss, "lr": lr, "grad_norm": norm}
            run.metrics.write({**record, "tokens_per_s": rate, "mfu": mfu, "time": run.seconds})
            logged = (now, step)
        pause = time.perf_counter()
        if run.val_batches and (step % config.val_every == 0 or step == steps):
            _validate(run)
        if run.sample_every and (step % run.sample_every == 0 or step == steps):
            _sample(run)
        if stop.signal or step == steps or (run.save_every and step % run.save_every == 0):
            _save(run)
        paused += time.perf_counter() - pause
    run.trained_steps, run.training_seconds = run.step - first, time.perf_counter() - paused - begin
    if run.checkpoint is None or run.checkpoint.name != checkpoint_name(run.step):
        _save(run)  # a signal came between two steps


def accumulate_gradients(forward: Callable[..., torch.Tensor], batches: Iterator[Batch], count: int = 1) -> float:
    """Add the gradient of the mean loss over `count` micro-batches to the parameters' ``grad``; returns that loss.

    Every target weighs the same wherever it stands, so micro-batches with more ignored targets (-100) weigh less, and
    the result is that of one large batch.

    Example:
        >>> loss = accumulate_gradients(model, loader, count=4)
        >>> optimizer.step()
    """
    return _mean(_accumulate(forward, batches, count))


def _accumulate(forward, batches: Iterator[Batch], count: int) -> list[tuple[float, torch.Tensor]]:
    """Adds gradients; each micro-batch's weight and loss."""
    micro_batches = [next(batches) for _ in range(count)]
    counts = [1] if count == 1 else [_count_targets(batch) for batch in micro_batches]
    losses: list[tuple[float, torch.Tensor]] = []
    for batch, targets in zip(micro_batches, counts):
        if targets:  # the mean over none would be NaN
            weight = targets / sum(counts)
            loss = _loss(forward, batch)
            loss.backward(None if weight == 1.0 else torch.full_like(loss, weight))
            losses.append((weight, loss.detach()))
    return losses


def _mean(losses: list[tuple[float, torch.Tensor]]) -> float:
    return sum((weight * loss.item() for weight, loss in losses), 0.0)  # waits for a GPU


def _loss(forward: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
    return forward(batch.inputs, batch.targets, cu_seqlens=batch.cu_seqlens, position_ids=batch.position_ids)


def _count_targets(batch: Batch) -> int:
    return batch.targets.numel() if batch.cu_seqlens is None else int((batch.targets != IGNORE).sum())


@torch.no_grad()
def _validate(run: Run) -> None:
    """Mean loss over the targets of the validation batches."""
    total, targets = 0.0, 0
    for batch in run.val_batches:
        if count := _count_targets(batch):
            total += _loss(run.forward, batch).item() * count
            targets += count
    run.val_loss, run.val_step = total / max(targets, 1), run.step
    if not math.isfinite(run.val_loss):
        raise NonFiniteError(f"step {run.step}: the validation loss is {run.val_loss}; {_last_good(run)}")
    bits = run.bits_per_byte(run.val_loss)
    record = {"kind": "val", "step": run.step, "tokens": run.tokens, "loss": run.val_loss}
    run.metrics.write({**record, "bits_per_byte": bits, "time": run.seconds})
    per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
    run.display.line(f"step {run.step}: validation loss {run.val_loss:.4f}{per_byte}", style="bold")


def _sample(run: Run) -> None:
    """A continuation of the prompt by the model as it is; the same random numbers each time."""
    config, tokenizer, context = run.config, run.data.tokenizer, run.model.config.context
    ids = tokenizer.encode(config.sample_prompt)[-max(1, context // 2) :]
    if not ids:  # the start of a document: after the end of another, or as the text itself starts
        ids = [tokenizer.eot_id] if tokenizer.eot_id is not None else run.data.train.read(0, 1).tolist()
    count = min(config.sample_tokens, context - len(ids))
    prompt = torch.tensor([ids], dtype=torch.int64, device=run.device)
    out = run.model.generate(prompt, max_new_tokens=count, temperature=0.8, top_k=50, seed=config.seed)
    text = tokenizer.decode(out[0].tolist())
    run.metrics.write({"kind": "sample", "step": run.step, "text": text})
    run.display.line(f"step {run.step}: sample\n{text}", style="dim")


def _save(run: Run) -> None:
    if run.val_step == run.step and (run.best is None or run.val_loss < run.best["loss"]):
        run.best = {"step": run.step, "loss": run.val_loss}
    run.metrics.sync()
    state = {
        "llmfast": llmfast.__version__,
        "step": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "data": run.loader.state_dict(),
        "fingerprint": fingerprint_of(run.identity),
        "run": run.identity,
        "threads": torch.get_num_threads(),
        "isa": backend.info()["isa"],
        "device": device_name(run.device),
        "metrics_records": run.metrics.records,
        "train_loss": run.train_loss,
        "val_loss": run.val_loss,
        "val_step": run.val_step,
        "best": run.best,
    }
    try:
        run.checkpoint = save_checkpoint(
            run.folder, model=run.model, optimizer=run.optimizer, tokenizer=run.data.tokenizer, state=state,
            keep=run.config.keep,
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"step {run.step}: {error}; {_last_good(run)}") from error


def _non_finite(run: Run, loss: float, norm: float) -> NonFiniteError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4f}, the gradient's norm {norm}"
    return NonFiniteError(f"step {run.step + 1}: {what}; stopped before changing the weights, {_last_good(run)}")


def _last_good(run: Run) -> str:
    return f"the last good checkpoint is {run.checkpoint}" if run.checkpoint else "there is no checkpoint yet"


def _finish(run: Run, stop: StopRequest) -> None:
    run.display.line(plot_losses(run.folder))
    run.display.line(f"MFU is against {run.peak_flops / 1e9:,.0f} GFLOP/s, the peak measured at the start of this run")
    if stop.signal:
        run.display.line(
            f"stopped after step {run.step} of {run.config.total_steps}; saved {run.checkpoint}\n"
            f"resume with: llmfast pretrain --resume {run.folder}",
            style="bold yellow",
        )
    elif run.trained_steps == 0:
        steps = run.config.total_steps
        run.display.line(f"nothing to do: {run.checkpoint} is at step {run.step} of {steps}", style="bold")
    else:
        run.display.line(f"done: {run.checkpoint}", style="bold green")


def _result(run: Run, stop: StopRequest) -> PretrainResult:
    rate, mfu = run.throughput(run.trained_steps, run.training_seconds)
    return PretrainResult(
        out_dir=run.folder,
        checkpoint=run.checkpoint,
        step=run.step,
        train_loss=run.train_loss,
        val_loss=run.val_loss,
        bits_per_byte=run.bits_per_byte(run.val_loss),
        tokens_per_s=rate,
        mfu=mfu,
        peak_flops=run.peak_flops,
        seconds=run.seconds,
        signal=stop.signal,
        model=run.model,
        tokenizer=run.data.tokenizer,
    )
