"""Data: corpora, tokenizers, token shards, and the batches made of them.

The way through::

    corpus = open_corpus("stdlib")                          # or a text file, folder, glob, JSONL, Parquet
    tokenizer = build_tokenizer("bpe", corpus, vocab_size=8192)
    dataset = prepare(corpus, tokenizer, "data/stdlib")     # cached: the second time costs nothing
    loader = BatchLoader(dataset.train, batch_size=8, seq_len=256, seed=1)
    batch = next(loader)                                    # batch.inputs, batch.targets
"""

from .bpe import BPETokenizer
from .corpora import Corpus, DocumentList, open_corpus
from .dataset import Dataset, TokenSplit, open_dataset
from .loader import Batch, BatchLoader, eval_batches
from .prepare import prepare
from .shards import Shard, ShardError, ShardWriter, open_shard, write_shard
from .tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "BatchLoader",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Dataset",
    "DocumentList",
    "Shard",
    "ShardError",
    "ShardWriter",
    "StreamDecoder",
    "TokenSplit",
    "Tokenizer",
    "build_tokenizer",
    "eval_batches",
    "load_tokenizer",
    "open_corpus",
    "open_dataset",
    "open_shard",
    "prepare",
    "write_shard",
]
