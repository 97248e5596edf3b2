"""A prepared dataset: train and validation splits, each a stream of tokens over one or more shards."""

from __future__ import annotations

import glob
import json
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .files import fingerprint_of
from .shards import Shard, ShardError, open_shard
from .tokenizers import Tokenizer, load_tokenizer

DATASET_FILE = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"


class TokenSplit:
    """The tokens of several shards as one stream, in the order given.

    Attributes: `name`; `shards`; `n_tokens` (also ``len``); `fingerprint`, 32 hex digits taken from the headers, so
    that a training run knows its data again.

    Example::

        split = TokenSplit.open("fineweb10B/fineweb_train_*.bin")
        split.read(0, 1024)
    """

    def __init__(self, name: str, shards: Iterable[Shard]):
        self.name = name
        self.shards = tuple(shards)
        if not self.shards:
            raise ValueError(f"split {name!r}: no shards; expected at least one")
        writers = {(shard.format, shard.tokenizer_fingerprint) for shard in self.shards}
        if len(writers) > 1:
            raise ValueError(f"split {name!r}: the shards were written with different tokenizers or formats")
        self._ends = list(accumulate(shard.tokens.size for shard in self.shards))
        self.n_tokens = self._ends[-1]

    @classmethod
    def open(cls, paths: str | os.PathLike | Iterable[str | os.PathLike], name: str | None = None) -> TokenSplit:
        """Shards of llmfast or llm.c: a path, a glob (sorted), or several paths (in the order given)."""
        if isinstance(paths, (str, os.PathLike)):
            pattern = os.fspath(paths)
            files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not files:
                raise FileNotFoundError(f"paths {pattern!r}: no such file, and no file matches it as a glob")
            return cls(name or pattern, map(open_shard, files))
        return cls(name or "shards", map(open_shard, paths))

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"TokenSplit({self.name!r}, {self.n_tokens:,} tokens, {len(self.shards)} shards)"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` (exclusive) of the stream; a view of the map unless shards meet in between."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} are outside the {self.n_tokens} of split {self.name!r}")
        index = bisect_right(self._ends, start)
        parts = []
        while start < stop:
            first = self._ends[index - 1] if index else 0
            part = self.shards[index].tokens[start - first : stop - first]
            parts.append(part)
            start += part.size
            index += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self.shards[0].tokens[:0]])

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64, ascending: the positions in the stream where a document starts."""
        if len(self.shards) == 1:
            return self.shards[0].document_starts
        firsts = [0, *self._ends]
        return np.concatenate([shard.document_starts + first for shard, first in zip(self.shards, firsts)])

    @property
    def text_bytes(self) -> int | None:
        """Bytes of UTF-8 that the tokens were made from; None when the shards do not say (llm.c)."""
        counts = [shard.text_bytes for shard in self.shards]
        return None if None in counts else sum(counts)

    @property
    def bytes_per_token(self) -> float | None:
        """``bits_per_byte = nats_per_token / ln 2 / bytes_per_token``. End-of-document tokens count as tokens: the
        model has to predict them too."""
        return None if self.text_bytes is None else self.text_bytes / self.n_tokens

    @cached_property
    def fingerprint(self) -> str:
        # llm.c's shards have no checksum: their first and last tokens stand in for one
        ends = [shard.checksum or shard.tokens[:512].tobytes() + shard.tokens[-512:].tobytes() for shard in self.shards]
        return fingerprint_of([(s.format, s.tokens.size, end.hex()) for s, end in zip(self.shards, ends)])

    def verify(self) -> None:
        """Read every shard and compare its checksum; ShardError for the first that differs."""
        for shard in self.shards:
            shard.verify()


@dataclass(frozen=True, eq=False)
class Dataset:
    """What `prepare` makes and `open_dataset` finds again. `val` is None when prepared with ``val_fraction=0``.

    `info` is the content of ``dataset.json``: corpus, tokenizer, counts.
    """

    folder: Path
    info: dict[str, Any]
    train: TokenSplit
    val: TokenSplit | None

    @property
    def fingerprint(self) -> str:
        return self.info["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.info["tokenizer"]["vocab_size"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / TOKENIZER_FOLDER)

    @property
    def val_bytes_per_token(self) -> float:
        """For bits per byte: ``val_loss / ln 2 / val_bytes_per_token``."""
        if self.val is None:
            raise ValueError(f"{self.folder} has no validation split: it was prepared with val_fraction=0")
        return self.val.bytes_per_token


def open_dataset(folder: str | os.PathLike, *, verify: bool = False) -> Dataset:
    """Open what `prepare` wrote in `folder`; costs the same for any size, unless `verify` asks to read all of it.

    Errors: FileNotFoundError when there is no dataset or a shard is missing; ShardError when one is damaged or foreign.

    Example::

        dataset = open_dataset("data/stdlib")
        loader = BatchLoader(dataset.train, batch_size=8, seq_len=256, seed=1)
    """
    folder = Path(folder)
    file = folder / DATASET_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no dataset in {folder}: {DATASET_FILE} is not there; prepare() writes it")
    try:
        info = json.loads(file.read_bytes())
        splits = {name: _open_split(folder, name, info) for name in info["splits"]}
        dataset = Dataset(folder, info, splits["train"], splits.get("val"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ShardError(f"{file}: not a dataset description of this llmfast ({error!r})") from None
    if verify:
        for split in splits.values():
            split.verify()
    return dataset


def _open_split(folder: Path, name: str, info: dict[str, Any]) -> TokenSplit:
    shards = [open_shard(folder / file) for file in info["splits"][name]["shards"]]
    for shard in shards:
        if shard.dataset_fingerprint != info["fingerprint"]:
            raise ShardError(f"{shard.path}: belongs to another dataset than {DATASET_FILE} beside it")
    split = TokenSplit(name, shards)
    if split.n_tokens != info["splits"][name]["tokens"]:
        raise ShardError(f"{folder}: split {name!r} has {split.n_tokens} tokens, {DATASET_FILE} says otherwise")
    return split
