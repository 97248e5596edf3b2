"""What a run shows: a live bar on a terminal, plain lines now and then anywhere else."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Display"]

SECONDS_PER_FRAME = 0.25  # drawing takes about a millisecond of the thread that also starts every kernel
SECONDS_PER_LINE = 10.0
LINES_PER_RUN = 20


class Display:
    """Shows stages of preparation, then training progress. Draws only when called: no thread of its own.

    The training loop calls `show` only once `due` (a `time.perf_counter` value) has passed.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self.due = 0.0
        self._bar: Progress | None = None
        self._stage = ""
        self._task: Any = None
        self._started = (0.0, 0)
        self._lines = 0

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line; on a terminal, above the bar."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def stage(self, name: str, done: int, total: int) -> None:
        """Progress of preparing the data, in bytes; has the form that `llmfast.data` calls back."""
        if name != self._stage:
            self.close()
            self._stage = name
            if self.live:
                self._open(BarColumn(), TextColumn("{task.percentage:>3.0f}%"), total=total, name=name)
            else:
                self.line(f"{name} ({total / 1e6:.1f} MB)")
        if self.live and (time.perf_counter() >= self.due or done >= total):
            self._bar.update(self._task, completed=done, refresh=True)
            self.due = time.perf_counter() + SECONDS_PER_FRAME

    def start(self, step: int, steps: int) -> None:
        """Training begins at `step` of `steps`."""
        self.close()
        self._started = (time.perf_counter(), step)
        if self.live:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._open(*columns, total=steps, name="training", completed=step, text="")

    def show(self, step: int, steps: int, text: str) -> None:
        """Where training is; `text` is the rest of the line."""
        now = time.perf_counter()
        if self.live:
            self._bar.update(self._task, completed=step, text=text, refresh=True)
            self.due = now + SECONDS_PER_FRAME
            return
        started, first = self._started
        seconds = (now - started) / max(1, step - first) * (steps - step)
        self.line(f"step {step:>{len(str(steps))}}/{steps}  {text}  ETA {_clock(seconds)}")
        self._lines += 1
        # a short run gets about LINES_PER_RUN lines, a long one a line every SECONDS_PER_LINE
        self.due = now + min(SECONDS_PER_LINE, max(0.5, (seconds + now - started) / LINES_PER_RUN))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._stage = ""
        self.due = 0.0

    def _open(self, *columns: Any, total: int, name: str, **fields: Any) -> None:
        self._bar = Progress(TextColumn("{task.description}"), *columns, console=self.console, auto_refresh=False)
        self._task = self._bar.add_task(name, total=total, **fields)
        self._bar.start()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
