"""What a run records: metrics.jsonl always, TensorBoard on request, and a plot of the losses at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmfast.data.files import atomic_file

__all__ = ["METRICS_FILE", "PLOT_FILE", "MetricsLog", "plot_losses", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


class MetricsLog:
    """Appends one JSON object a record to ``metrics.jsonl``, at once visible to readers.

    Records have ``kind``: ``train`` (step, tokens, loss, lr, grad_norm, tokens_per_s, mfu, time), ``val`` (step,
    tokens, loss, bits_per_byte, time) or ``sample`` (step, text). `step` counts finished optimiser steps, `time` the
    seconds of training. Opening with `last_step` drops the records of later steps, which a resumed run writes anew.

    Raises:
        ImportError: `tensorboard` is asked for and not installed.

    Example:
        >>> with MetricsLog(folder) as log:
        ...     log.write({"kind": "val", "step": 100, "loss": 2.1})
    """

    def __init__(
        self,
        folder: Path,
        *,
        last_step: int = 0,
        tensorboard: bool = False,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._callback = callback
        self._board = _tensorboard(folder / "tensorboard", last_step) if tensorboard else None
        path = folder / METRICS_FILE
        self.records = 0
        if path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= last_step]
            with atomic_file(path) as file:
                file.writelines(_line(record) for record in kept)
            self.records = len(kept)
        self._file = open(path, "ab")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()
        self.records += 1
        if self._board is not None:
            self._write_board(record)
        if self._callback is not None:
            self._callback(record)

    def sync(self) -> None:
        """Wait until the records are on the disk, as a checkpoint that counts them needs."""
        os.fsync(self._file.fileno())

    def _write_board(self, record: dict[str, Any]) -> None:
        step, kind = record["step"], record["kind"]
        if kind == "sample":
            self._board.add_text("sample", f"```\n{record['text']}\n```", step)
            return
        for name, value in record.items():
            if name not in ("kind", "step") and value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _tensorboard(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard: got True, but the package is not installed: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=last_step + 1)


def read_metrics(path: str | os.PathLike, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, or those of one kind. A last line that a killed run left unfinished is passed
    over.

    Raises:
        ValueError: another line is not a record, named by number.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number}: not a metrics record: {line[:80]!r}") from None
        if kind is None or record.get("kind") == kind:
            yield record


def plot_losses(folder: Path) -> str:
    """Draw training and validation loss over steps into ``loss.png``. Returns a line that says what came of it; a plot
    that cannot be drawn never fails a run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss plot: matplotlib is not installed (pip install matplotlib)"
    try:
        train = list(read_metrics(folder / METRICS_FILE, "train"))
        val = list(read_metrics(folder / METRICS_FILE, "val"))
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
        axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="training, each record")
        axes.plot(steps, _smoothed(losses), color="C0", label="training, smoothed")
        if val:
            axes.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", color="C1", label="validation")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / PLOT_FILE)
    except Exception as error:
        return f"no loss plot: {error}"
    return f"loss plot: {folder / PLOT_FILE}"


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values, without the start's bias."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
