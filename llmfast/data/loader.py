"""Batches for training and evaluation, each a function of (seed, step): resuming is setting a counter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .dataset import TokenSplit
from .shuffle import mix, permuted

if TYPE_CHECKING:
    import torch

MODES = ("packed", "random")
IGNORE = -100  # what cross-entropy leaves out
ROWS_AT_A_TIME = 4096  # shuffling these takes 0.2 to 1.1 ms (measured): a fraction of a microsecond a row


class Batch(NamedTuple):
    """`inputs` and `targets`: int64 [B, T], contiguous, on the CPU; ``targets[b, t]`` follows ``inputs[b, t]``.

    Only with ``respect_documents=True``, else None: `cu_seqlens`, int32 [segments + 1], where each stretch of one
    document starts in the B*T flattened tokens, then B*T (what `varlen_attention` takes); `position_ids`, int64
    [B, T], from 0 in each stretch. A row always starts a new stretch.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """On `device`. A GPU copies from pinned memory, while the host goes on."""
        if device.type == "cpu":
            return self
        return Batch(*(t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))


class BatchLoader:
    """An endless iterator of `Batch`, deterministic and exactly resumable.

    split: the tokens, e.g. ``dataset.train``.
    batch_size, seq_len: B rows of T tokens, for each of the `world_size` processes.
    seed: another seed, another order.
    mode: ``"packed"`` cuts the stream into windows of T tokens and visits them all, shuffled anew each epoch: in an
        epoch each token but the first is a target once, up to the last (n_tokens - 1) % T, which are left out.
        ``"random"`` takes every window at a random offset (nanoGPT's way).
    respect_documents: targets that would predict over a document boundary become -100, and batches carry
        `cu_seqlens` and `position_ids`, so that attention can stay inside documents.
    rank, world_size: rows of a step are dealt to the ranks in order; ranks together see what one process with
        ``batch_size * world_size`` would.

    Errors: ValueError for a split shorter than ``seq_len + 1`` tokens or an argument out of range.

    Example::

        loader = BatchLoader(dataset.train, batch_size=8, seq_len=256, seed=1)
        for batch in itertools.islice(loader, 1000):
            loss = model(batch.inputs, batch.targets)
        state = loader.state_dict()          # later, or elsewhere: loader.load_state_dict(state)
    """

    def __init__(
        self,
        split: TokenSplit,
        batch_size: int,
        seq_len: int,
        *,
        seed: int = 0,
        mode: str = "packed",
        respect_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 to world_size - 1, with world_size {world_size}")
        self.n_windows = count_windows(split, batch_size, seq_len)
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len
        self.seed, self.mode, self.respect_documents = seed, mode, respect_documents
        self.rank, self.world_size = rank, world_size
        self.step = 0
        self._block_number = -1
        self._block = np.empty(0, np.int64)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together take in a step."""
        return self.batch_size * self.world_size * self.seq_len

    @property
    def epoch(self) -> float:
        """How often the split has been seen so far; in random mode, how often as many tokens have."""
        return self.step * self.batch_size * self.world_size / self.n_windows

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def batch(self, step: int) -> Batch:
        """This rank's batch at `step`, without moving the loader."""
        first = (step * self.world_size + self.rank) * self.batch_size
        offsets = self._offsets(first, first + self.batch_size)
        return make_batch(self.split, offsets, self.seq_len, self.respect_documents)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the position counts rows of all ranks, so it holds for any batch size and number of ranks."""
        return {"rows": self.step * self.batch_size * self.world_size, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, exactly.

        Errors: ValueError when the loader has other data, seed, mode or seq_len, or when its steps (of batch_size *
        world_size rows) do not meet the position.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(f"state has {name} {state.get(name)!r}, this loader has {mine!r}; expected the same")
        rows_per_step = self.batch_size * self.world_size
        if state["rows"] % rows_per_step:
            raise ValueError(f"state is at row {state['rows']}; expected a multiple of {rows_per_step} rows a step")
        self.step = state["rows"] // rows_per_step

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "mode", "seq_len", "respect_documents")
        return {"split": self.split.fingerprint, **{name: getattr(self, name) for name in names}}

    def _offsets(self, first: int, last: int) -> np.ndarray:
        """Where rows `first` to `last` (exclusive, counted from the beginning of training) start in the stream."""
        if self.mode == "random":
            span = self.split.n_tokens - self.seq_len
            return (mix(self.seed, np.arange(first, last)) % np.uint64(span)).astype(np.int64)
        rows = []
        while first < last:
            number, skip = divmod(first, ROWS_AT_A_TIME)
            if number != self._block_number:
                self._block_number, self._block = number, self._shuffled_block(number)
            rows.append(self._block[skip : skip + last - first])
            first += rows[-1].size
        return (rows[0] if len(rows) == 1 else np.concatenate(rows)) * self.seq_len

    def _shuffled_block(self, number: int) -> np.ndarray:
        rows = number * ROWS_AT_A_TIME + np.arange(ROWS_AT_A_TIME)
        epochs, index = np.divmod(rows, self.n_windows)
        return permuted(index, self.n_windows, mix(self.seed, epochs))


def eval_batches(
    split: TokenSplit, batch_size: int, seq_len: int, max_batches: int | None = None, *, respect_documents: bool = False
) -> Iterator[Batch]:
    """The same batches on every call, for validation: non-overlapping windows in stream order.

    With `max_batches`, ``batch_size * max_batches`` windows spread evenly over the split. The last batch may have fewer
    rows, so weight batch losses by their targets. ValueError as for `BatchLoader`.

    Example::

        losses = [model(b.inputs, b.targets) for b in eval_batches(dataset.val, 8, 256, max_batches=20)]
    """
    n_windows = count_windows(split, batch_size, seq_len)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}; expected at least 1, or None for all")
    n_rows = n_windows if max_batches is None else min(n_windows, batch_size * max_batches)
    offsets = np.arange(n_rows) * n_windows // n_rows * seq_len
    parts = (offsets[first : first + batch_size] for first in range(0, n_rows, batch_size))
    return (make_batch(split, part, seq_len, respect_documents) for part in parts)


def count_windows(split: TokenSplit, batch_size: int, seq_len: int) -> int:
    """Non-overlapping windows of `seq_len` tokens with a target for each; ValueError if there is none."""
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if split.n_tokens < seq_len + 1:
        raise ValueError(
            f"split {split.name!r} has {split.n_tokens} tokens; expected at least seq_len + 1 = {seq_len + 1}. "
            "Use more text or a smaller seq_len"
        )
    return (split.n_tokens - 1) // seq_len


def make_batch(split: TokenSplit, offsets: np.ndarray, seq_len: int, respect_documents: bool) -> Batch:
    """The batch whose rows start at `offsets` (int64 [B]) of the stream."""
    from torch import from_numpy

    tokens = np.stack([split.read(offset, offset + seq_len + 1) for offset in offsets.tolist()])  # [B, T+1]
    inputs, targets = tokens[:, :-1].astype(np.int64, "C"), tokens[:, 1:].astype(np.int64, "C")
    if not respect_documents:
        return Batch(from_numpy(inputs), from_numpy(targets))
    starts = starts_in_rows(split.document_starts, offsets, seq_len)
    targets[starts[:, 1:]] = IGNORE
    starts[:, 0] = True
    starts = starts[:, :-1]
    cu_seqlens = np.append(np.flatnonzero(starts), inputs.size).astype(np.int32)
    columns = np.arange(seq_len)
    position_ids = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return Batch(*map(from_numpy, (inputs, targets, cu_seqlens, position_ids)))


def starts_in_rows(document_starts: np.ndarray, offsets: np.ndarray, seq_len: int) -> np.ndarray:
    """bool [B, T+1]: is ``offsets[b] + t`` where a document starts?"""
    first = np.searchsorted(document_starts, offsets)
    last = np.searchsorted(document_starts, offsets + seq_len, side="right")
    marks = np.zeros((offsets.size, seq_len + 1), bool)
    for row, offset in enumerate(offsets.tolist()):
        marks[row, document_starts[first[row] : last[row]] - offset] = True
    return marks
