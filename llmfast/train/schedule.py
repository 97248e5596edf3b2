"""Learning-rate schedules: plain functions of the step number."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "learning_rate"]

SCHEDULES = ("cosine", "wsd", "constant")


def learning_rate(
    step: int,
    *,
    schedule: str = "cosine",
    peak: float,
    floor: float = 0.0,
    warmup: int = 0,
    total: int,
    decay_fraction: float = 0.2,
) -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    Every schedule rises linearly over the first `warmup` steps, to ``peak * (step + 1) / (warmup + 1)``, and then:

    * ``cosine``: falls from `peak` to `floor` at step `total` on half a cosine (Loshchilov & Hutter 2017; with the
      warm-up this is nanoGPT's formula);
    * ``wsd``, warm-up-stable-decay (Hu et al. 2024, MiniCPM): stays at `peak`, then falls on a line to `floor` over the
      last ``decay_fraction * total`` steps before step `total`;
    * ``constant``: stays at `peak`; `floor` and `total` do not matter.

    From step `total` on, cosine and wsd stay at `floor`.

    Raises:
        ValueError: no schedule has that name.

    Example:
        >>> [round(learning_rate(s, peak=1.0, warmup=1, total=5), 3) for s in range(6)]
        [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: got {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    if step >= total:
        return floor
    if schedule == "cosine":
        done = (step - warmup) / (total - warmup)
        return floor + 0.5 * (1.0 + math.cos(math.pi * done)) * (peak - floor)
    decay_steps = min(decay_fraction * total, total - warmup)
    left = total - step
    return peak if left >= decay_steps else floor + (peak - floor) * left / decay_steps
