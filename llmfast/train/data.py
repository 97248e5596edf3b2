"""From the data and tokenizer that a `PretrainConfig` names to token splits that can be trained on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmfast.data import (
    Dataset,
    Tokenizer,
    TokenSplit,
    build_tokenizer,
    load_tokenizer,
    open_corpus,
    open_dataset,
    prepare,
)
from llmfast.data.dataset import DATASET_FILE, TOKENIZER_FOLDER
from llmfast.data.files import Progress
from llmfast.data.tokenizers import TOKENIZER_KINDS
from llmfast.train.config import PretrainConfig

__all__ = ["TrainingData", "training_data"]

SHARD_VOCABULARIES = {"llm.c gpt-2": 50257, "llm.c llama-3": 128256}
LARGEST_BYTE_COUNT = 1 << 24  # tokens of a foreign validation split that are decoded to learn its bytes per token


@dataclass(frozen=True)
class TrainingData:
    """Token splits, and what decides them. `tokenizer` and `val_bytes_per_token` are None where nothing tells them."""

    train: TokenSplit
    val: TokenSplit | None
    tokenizer: Tokenizer | None
    vocab_size: int
    val_bytes_per_token: float | None

    def identity(self) -> dict[str, str | int | None]:
        """What must be the same for a run to continue on this data."""
        return {
            "train_data": self.train.fingerprint,
            "val_data": self.val and self.val.fingerprint,
            "tokenizer": self.tokenizer and self.tokenizer.fingerprint,
            "vocab_size": self.vocab_size,
        }

    def verify(self, progress: Progress) -> None:
        """Compares all tokens with their checksums, as a run must that is to go on as if never ended: ShardError."""
        shards = [shard for split in (self.train, self.val) if split for shard in split.shards]
        sizes = [shard.tokens.nbytes for shard in shards]
        for i, shard in enumerate(shards):
            progress("checking the data", sum(sizes[:i]), sum(sizes))
            shard.verify()


def training_data(
    config: PretrainConfig, run: Path, progress: Progress | None = None, *, resuming: bool = False
) -> TrainingData:
    """Open what `config.data` names; text is tokenised into ``config.dataset_dir`` (default ``run/dataset``) first.

    A run that is `resuming` takes the tokenised data as it lies there, without reading the text again.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: as `open_corpus`, `build_tokenizer`, `prepare` and
        `open_dataset` raise them, and ValueError when shards do not tell their vocabulary.
    """
    if config.data.endswith(".bin"):
        return _from_shards(config)
    if config.val_data is not None:
        raise ValueError(
            f"val_data: got {config.val_data!r}, expected none, as data = {config.data!r} is not a .bin shard"
        )
    folder = Path(config.dataset_dir or run / "dataset")
    if (Path(config.data) / DATASET_FILE).is_file():
        return _from_dataset(open_dataset(config.data))
    prepared = (folder / DATASET_FILE).is_file()
    if prepared and resuming:
        return _from_dataset(open_dataset(folder))
    corpus = open_corpus(config.data, text_field=config.text_field, separator=config.separator)
    tokenizer = _saved_tokenizer(folder, config) if prepared else None
    if tokenizer is None and config.tokenizer in TOKENIZER_KINDS:
        tokenizer = build_tokenizer(config.tokenizer, corpus, config.bpe_vocab_size, progress)
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer)
    return _from_dataset(prepare(corpus, tokenizer, folder, val_fraction=config.val_fraction, progress=progress))


def _saved_tokenizer(folder: Path, config: PretrainConfig) -> Tokenizer | None:
    """The dataset's own tokenizer if it is what `config` would train again; `prepare` checks that the text is too."""
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    if tokenizer.kind != config.tokenizer:
        return None
    return tokenizer if tokenizer.kind != "bpe" or tokenizer.vocab_size == config.bpe_vocab_size else None


def _from_dataset(dataset: Dataset) -> TrainingData:
    val_bytes = dataset.val.bytes_per_token if dataset.val else None
    return TrainingData(dataset.train, dataset.val, dataset.tokenizer, dataset.vocab_size, val_bytes)


def _from_shards(config: PretrainConfig) -> TrainingData:
    train = TokenSplit.open(config.data, "train")
    val = TokenSplit.open(config.val_data, "val") if config.val_data else None
    tokenizer = None if config.tokenizer in TOKENIZER_KINDS else load_tokenizer(config.tokenizer)
    for split in filter(None, (train, val)):
        written_with = split.shards[0].tokenizer_fingerprint
        if tokenizer and written_with and written_with != tokenizer.fingerprint:
            raise ValueError(
                f"tokenizer: got {config.tokenizer!r}, expected the one that {split.name} was written with"
            )
    vocab_size = tokenizer.vocab_size if tokenizer else config.vocab_size
    vocab_size = vocab_size or SHARD_VOCABULARIES.get(train.shards[0].format)
    if vocab_size is None:
        raise ValueError(
            f"vocab_size: got none, and {os.fspath(config.data)!r} does not tell; expected it or a tokenizer"
        )
    val_bytes = val.bytes_per_token if val else None
    if val and val_bytes is None and tokenizer:
        lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
        val_bytes = float(lengths[val.read(0, min(len(val), LARGEST_BYTE_COUNT))].mean())
    return TrainingData(train, val, tokenizer, vocab_size, val_bytes)
