"""Decoding on a GPU as a CUDA graph: one launch a token instead of a few hundred, which for small batches is most of
the time.

A graph replays the same kernels with the same arguments, so whatever changes from token to token has to be device data.
Keys and values go into their place by an index in device memory, and which columns of the cache a query sees is a
boolean mask there, which the attention kernel reads anyway: a column's content does not matter while it is hidden. What
remains an argument is the number of columns that attention walks through; it grows in steps of `BUCKET`, with a new
graph for each step, so that at most that many columns are read in vain. (Lengths in device memory would save those
reads, at the price of a second decoding kernel; a mask needs nothing new.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmfast.nn import KVCache

if TYPE_CHECKING:
    from llmfast.models import GPT

__all__ = ["GraphedStep", "why_not_graphed"]

BUCKET = 256
FEWEST_STEPS = 16  # capturing costs about as much as so many steps


def why_not_graphed(model: GPT, device: torch.device, steps: int) -> str | None:
    """Why decoding launches its kernels one by one; None where it may replay a graph."""
    if device.type != "cuda":
        return "not a GPU"
    if steps < FEWEST_STEPS:
        return "too few tokens"
    if model.config.window is not None:
        return "a sliding window, whose place in the cache is an argument of the kernel"
    if torch.cuda.is_current_stream_capturing():
        return "inside another graph"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "hooks, which a graph would not call"
    return None


class SlotCache:
    """A `KVCache` whose next place is device data: for one token a row and call."""

    def __init__(self, cache: KVCache, slot: Tensor) -> None:
        self.k, self.v, self.slot = cache.k, cache.v, slot
        self.columns = 0  # what attention walks through, with the new token

    @property
    def length(self) -> int:
        return self.columns - 1

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes ``[B, Hkv, 1, D]`` at the slot; returns views of the columns."""
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer.index_copy_(2, self.slot, new)
        return self.k[:, :, : self.columns], self.v[:, :, : self.columns]


class GraphedStep:
    """Logits ``[B, V]`` for the next token of each row, from caches that hold what came before.

    `position` ``[B, 1]`` int64 is that of the next token; `visible` ``[B, 1, 1, capacity]``, or None for all, says which
    columns of the caches a query may see. Results stay valid until the next call.
    """

    def __init__(self, model: GPT, caches: list[KVCache], position: Tensor, visible: Tensor | None) -> None:
        self.model, self.length, self.capacity = model, caches[0].length, caches[0].capacity
        B, device = position.shape[0], position.device
        self._tokens, self._position = torch.zeros_like(position), position.clone()
        self._slot = torch.full((1,), self.length, dtype=torch.int64, device=device)
        filled = (torch.arange(self.capacity, device=device) < self.length).expand(B, 1, 1, -1)
        self._visible = (filled if visible is None else filled & visible).contiguous()
        self._caches = [SlotCache(cache, self._slot) for cache in caches]
        self._replay: Callable[[], None] | None = None
        self._columns = 0
        self._logits = position.new_empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """`tokens` ``[B, 1]`` int64: the last ones."""
        self.length += 1
        columns = min(-(-self.length // BUCKET) * BUCKET, self.capacity)
        self._tokens.copy_(tokens)
        if columns != self._columns:
            self._replay, self._columns = None, columns  # the old graph's memory goes first
            for cache in self._caches:
                cache.columns = columns
            self._replay = self._capture()
        self._replay()
        return self._logits

    def _step(self) -> None:
        self._visible.index_fill_(3, self._slot, True)
        self._logits = self.model(
            self._tokens,
            position_ids=self._position,
            mask=self._visible[..., : self._columns],
            caches=self._caches,
            last_only=True,
        )[:, -1]
        self._position.add_(1)
        self._slot.add_(1)

    def _capture(self) -> Callable[[], None]:
        state = (self._position, self._slot, self._visible)
        before = [t.clone() for t in state]
        side = torch.cuda.Stream(self._slot.device)
        side.wait_stream(torch.cuda.current_stream(self._slot.device))
        with torch.cuda.stream(side):
            self._step()  # loads kernels and lets libraries allocate, which capturing forbids
            for tensor, value in zip(state, before):
                tensor.copy_(value)
        torch.cuda.current_stream(self._slot.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay


def try_graphed(model: GPT, caches: list[KVCache], position: Tensor, visible: Tensor | None, tokens: Tensor):
    """A `GraphedStep` and its first logits, or None where the graph cannot be captured (a warning says why)."""
    try:
        step = GraphedStep(model, caches, position, visible)
        return step, step(tokens)
    except RuntimeError as error:
        warnings.warn(f"decoding without a CUDA graph: {error}", stacklevel=2)
        return None
