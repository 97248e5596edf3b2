"""From logits to token ids: pure functions on ``[B, V]`` logits, and `Sampling`, which applies them in order.

Filters set the logits of excluded tokens to -inf. Their order and meaning are Hugging Face transformers': repetition
penalty, temperature, top-k, top-p, min-p; the likeliest token always stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "keep_min_p", "keep_top_k", "keep_top_p", "penalise_repetition", "pick"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (and ignores the three filters below).
        top_k: only the k likeliest tokens, and ties with the last of them.
        top_p: only the fewest likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020), in (0, 1].
        min_p: only tokens at least this many times as likely as the likeliest (Nguyen et al. 2024), in [0, 1].
        repetition_penalty: above 1 makes tokens of the prompt and of the text so far less likely (Keskar et al. 2019):
            positive logits are divided by it, negative ones multiplied.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        >>> ids = Sampling(temperature=0.8, top_k=50).next(logits, uniform=torch.rand(len(logits)))
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (the likeliest token) or above")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k: got {self.top_k}, expected a whole number from 1 (or None for all tokens)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected a number above 0 and up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: got {self.min_p}, expected a number from 0 to 1")
        penalty = self.repetition_penalty
        if penalty is not None and not 1e-30 <= penalty <= 1e30:  # float32 logits are divided by it
            raise ValueError(
                f"repetition_penalty: got {penalty}, expected a positive number from 1e-30 to 1e30 (1 changes nothing)"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def filtered(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits ``[B, V]`` in float32 after penalty, temperature and filters; `seen` bool ``[B, V]``."""
        logits = logits.float()
        if self.repetition_penalty is not None and seen is not None:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if self.greedy:
            return logits
        # From the largest down, so that a tiny temperature, here at least float32's smallest, cannot overflow.
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, int(self.top_k))
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits

    def next(self, logits: Tensor, uniform: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """One token id a row, ``[B]`` int64. `uniform` ``[B]`` in [0, 1) decides; unused when greedy.

        Raises:
            FloatingPointError: a row of logits holds NaN, infinity, or nothing but -infinity.
        """
        logits = self.filtered(logits, seen)
        highest, likeliest = logits.max(-1)
        if not torch.isfinite(highest).all():
            raise FloatingPointError("logits: the model's output is not finite (NaN or infinity)")
        return likeliest if self.greedy else pick(logits, uniform)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Where `seen`: positive logits divided by `penalty`, negative ones multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest of each row, and whatever equals the smallest of those."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest largest of each row whose probabilities sum to `p` or more; at least one."""
    ascending, order = logits.sort(dim=-1)
    # Summing from the unlikely end keeps the small terms' precision.
    below = ascending.softmax(-1).cumsum(-1)
    drop = below <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Those of each row with at least `p` times the largest probability."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverts the cumulative distribution of ``softmax(logits)`` at `uniform` ``[B]``: one number a row decides.

    In float64: float32 sums over a large vocabulary would lose its tail. Tokens at -inf are never picked, because the
    sum does not grow there and the first sum *above* the target is taken.
    """
    total = logits.double().softmax(-1).cumsum(-1)
    target = uniform.to(total)[:, None] * total[:, -1:]
    return torch.searchsorted(total, target, right=True)[:, 0]
