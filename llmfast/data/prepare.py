"""From a corpus and a tokenizer to a dataset on disk: tokenise, split, write shards; find them again next time."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from .corpora import Corpus, Documents
from .dataset import DATASET_FILE, TOKENIZER_FOLDER, Dataset, open_dataset
from .files import Progress, fingerprint_of, locked, write_json
from .shards import ShardWriter, write_shard
from .tokenizers import Tokenizer

FORMAT = 1  # of the split rule and the folder; a change makes old folders different datasets
BATCH_CHARACTERS = 1 << 20  # encoded at a time: enough for every core, and a progress bar moves
SHARD_TOKENS = 1 << 28


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike,
    *,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Dataset:
    """Tokenise `corpus` into train and validation shards in `out_dir`, or reuse those that are there.

    Reuse costs one stat a source file: same tokenizer, same `val_fraction`, and paths, sizes and times of the sources
    unchanged (if only the times changed, their content is hashed and compared).

    The split is a function of the text alone. With many documents, each goes whole to the side that the hash of its
    text says, so copies of a document never stand on both. With few (fewer than 10 expected in validation, so that a
    hash could leave it empty), the last `val_fraction` of each document's characters is validation, which for a single
    text is nanoGPT's split. Every document ends with the tokenizer's end-of-document token, if it has one.

    A shard is closed after the document that brings it to `shard_tokens`. `progress(stage, done, total)` counts bytes
    of the corpus. Several processes may call this at once: one works, the others wait and reuse.

    Errors: TypeError unless `corpus` is a Corpus; ValueError for a `val_fraction` outside [0, 1) or a corpus without
    text for both splits; FileExistsError when `out_dir` holds a different dataset, which is left as it is.

    Example::

        corpus = open_corpus("stdlib")
        dataset = prepare(corpus, build_tokenizer("bpe", corpus, 8192), "data/stdlib")
    """
    if not isinstance(corpus, Corpus):
        raise TypeError(f"corpus is {type(corpus).__name__}; expected a Corpus, as open_corpus gives")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; expected at least 0 and less than 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; expected at least 1")
    folder = Path(out_dir)
    if not (folder / DATASET_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / DATASET_FILE).exists():  # else another process made it while this one waited
                for left_by_killed_run in folder.glob(".*.tmp"):
                    left_by_killed_run.unlink()
                _write(folder, corpus, tokenizer, val_fraction, shard_tokens, progress)
                return open_dataset(folder)
    return _reuse(folder, corpus, tokenizer, val_fraction)


def _identity(corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> str:
    return fingerprint_of([FORMAT, corpus.fingerprint, tokenizer.fingerprint, val_fraction])


def _reuse(folder: Path, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> Dataset:
    dataset = open_dataset(folder)
    info = dataset.info
    differences = []
    if info["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        differences.append(f"its tokenizer is another one (a {info['tokenizer']['kind']} tokenizer)")
    if info["val_fraction"] != val_fraction:
        differences.append(f"its val_fraction is {info['val_fraction']}, not {val_fraction}")
    stamp = corpus.stamp
    if info["corpus"]["stamp"] != stamp and not differences:
        if info["corpus"]["fingerprint"] != corpus.fingerprint:
            differences.append(f"its corpus ({info['corpus']['name']}) has other content than {corpus.name}")
        else:
            info["corpus"]["stamp"] = stamp
            with contextlib.suppress(OSError):  # a read-only dataset only stays slower to recognise
                write_json(folder / DATASET_FILE, info)
    if differences or info["format"] != FORMAT:
        reason = "; ".join(differences) or f"its format is {info['format']}, not {FORMAT}"
        raise FileExistsError(
            f"{folder} holds a different dataset: {reason}. Choose another folder, or delete this one"
        )
    return dataset


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    val_fraction: float,
    shard_tokens: int,
    progress: Progress | None,
) -> None:
    stamp = corpus.stamp  # before reading: a source that changes meanwhile must not pass for unchanged later
    identity = _identity(corpus, tokenizer, val_fraction)
    documents = iter(corpus)
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], np.int32)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(_SplitWriter(folder, name, tokenizer, identity, shard_tokens))
            for name in ("train", "val")
        }
        for batch in _batches(assign_splits(documents, val_fraction)):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (name, text), tokens in zip(batch, encoded):
                writers[name].add(np.concatenate([tokens, eot]), len(text.encode()))
            if progress is not None:
                progress("tokenising", documents.bytes_read, corpus.size)
        _require_text(writers, corpus, val_fraction)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    info = {
        "format": FORMAT,
        "fingerprint": identity,
        "val_fraction": val_fraction,
        "corpus": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "stamp": stamp,
            "bytes": corpus.size,
            "replaced_utf8": documents.replaced,
        },
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
        },
        "splits": {name: writer.summary for name, writer in writers.items() if writer.summary["tokens"]},
    }
    write_json(folder / DATASET_FILE, info)  # last: its presence says that all the rest is there


def _require_text(writers: dict[str, _SplitWriter], corpus: Corpus, val_fraction: float) -> None:
    for name, writer in writers.items():
        if writer.summary["tokens"] == 0 and (name == "train" or val_fraction > 0):
            raise ValueError(
                f"corpus {corpus.name!r} leaves the {name} split without text at val_fraction={val_fraction}; "
                "expected more text, or another val_fraction (0 for no validation split)"
            )


def assign_splits(documents: Documents | Iterator[str], val_fraction: float) -> Iterator[tuple[str, str]]:
    """("train" or "val", text) for every document, or for both parts of each when there are few; see `prepare`."""
    if val_fraction == 0:
        yield from (("train", text) for text in documents)
        return
    few = min(1000, math.ceil(10 / val_fraction))
    first = list(islice(documents, few))
    if len(first) < few:
        for text in first:
            cut = int(len(text) * (1 - val_fraction))
            yield from ((name, part) for name, part in (("train", text[:cut]), ("val", text[cut:])) if part)
        return
    for text in chain(first, documents):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        yield "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train", text


def _batches(items: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for name, text in items:
        batch.append((name, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Writes the documents of one split into shards ``NAME_000.bin``, ``NAME_001.bin``, …"""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, identity: str, shard_tokens: int):
        self.summary: dict[str, Any] = {"shards": [], "tokens": 0, "documents": 0, "text_bytes": 0}
        self._folder, self._name, self._tokenizer = folder, name, tokenizer
        self._identity, self._shard_tokens = identity, shard_tokens
        self._open = contextlib.ExitStack()
        self._shard: ShardWriter | None = None

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        if self._shard is None:
            file = f"{self._name}_{len(self.summary['shards']):03d}.bin"
            tokenizer = self._tokenizer
            shard = write_shard(self._folder / file, tokenizer.vocab_size, tokenizer.fingerprint, self._identity)
            self._shard = self._open.enter_context(shard)
            self.summary["shards"].append(file)
        self._shard.add(tokens, text_bytes)
        for key, count in (("tokens", tokens.size), ("documents", 1), ("text_bytes", text_bytes)):
            self.summary[key] += count
        if self._shard.n_tokens >= self._shard_tokens:
            self._open.close()
            self._shard = None
