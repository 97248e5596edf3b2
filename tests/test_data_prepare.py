"""prepare: the split, the byte counts, the cache, and what is refused."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from llmfast.data import (
    ByteTokenizer,
    CharTokenizer,
    DocumentList,
    ShardError,
    build_tokenizer,
    open_corpus,
    open_dataset,
    prepare,
)

BYTES = ByteTokenizer()
MANY = DocumentList("many", [f"document number {n} — " + "x" * (n % 17) for n in range(400)])


def documents_of(split, tokenizer=BYTES):
    """The texts of a split, and that each ends with the end-of-document token."""
    tokens = split.read(0, len(split)).tolist()
    bounds = [*split.document_starts.tolist(), len(tokens)]
    documents = [tokens[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert all(document.count(tokenizer.eot_id) == 1 and document[-1] == tokenizer.eot_id for document in documents)
    return [tokenizer.decode(document) for document in documents]


def test_single_text_is_split_as_in_nanogpt(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(1003))
    corpus = DocumentList("one", [text])
    dataset = prepare(corpus, CharTokenizer.fit(corpus), tmp_path)
    cut = int(len(text) * 0.9)
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    assert dataset.train.read(0, len(dataset.train)).tolist() == [ids[character] for character in text[:cut]]
    assert dataset.val.read(0, len(dataset.val)).tolist() == [ids[character] for character in text[cut:]]
    assert dataset.val_bytes_per_token == 1


def test_few_documents_give_the_end_of_each_to_validation(tmp_path):
    dataset = prepare(DocumentList("few", ["a" * 10, "bé" * 10, "c"]), BYTES, tmp_path, val_fraction=0.2)
    assert documents_of(dataset.train) == ["a" * 8, "bé" * 8]
    assert documents_of(dataset.val) == ["aa", "bébé", "c"]


def test_many_documents_are_split_whole_by_their_text(tmp_path):
    dataset = prepare(MANY, BYTES, tmp_path / "a")
    train, val = documents_of(dataset.train), documents_of(dataset.val)
    assert sorted(train + val) == sorted(MANY) and 15 < len(val) < 75
    # the same document goes to the same side in another corpus, in another order, and when there twice
    again = DocumentList("again", [*reversed(MANY.documents), *(f"new {n}" for n in range(50)), *MANY.documents])
    dataset = prepare(again, BYTES, tmp_path / "b")
    assert set(val) == set(documents_of(dataset.val)) & set(MANY)
    assert not set(documents_of(dataset.val)) & set(documents_of(dataset.train))


def test_counts_of_bytes(tmp_path):
    tokenizer = build_tokenizer("bpe", MANY, 300)
    dataset = prepare(MANY, tokenizer, tmp_path)
    for split in (dataset.train, dataset.val):
        texts = documents_of(split, tokenizer)
        n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts) and len(split) == n_tokens
    assert dataset.val_bytes_per_token == dataset.val.text_bytes / len(dataset.val)
    assert dataset.vocab_size == 300 and dataset.tokenizer.fingerprint == tokenizer.fingerprint


def test_no_validation_split_on_request(tmp_path):
    dataset = prepare(MANY, BYTES, tmp_path, val_fraction=0)
    assert documents_of(dataset.train) == list(MANY) and dataset.val is None
    with pytest.raises(ValueError, match="no validation split"):
        _ = dataset.val_bytes_per_token


def test_shards_are_cut_between_documents(tmp_path):
    whole = prepare(MANY, BYTES, tmp_path / "one")
    parts = prepare(MANY, BYTES, tmp_path / "parts", shard_tokens=1000)
    assert len(parts.train.shards) > 5
    assert all(shard.tokens.size >= 1000 for shard in parts.train.shards[:-1])
    assert documents_of(parts.train) == documents_of(whole.train)
    assert parts.fingerprint == whole.fingerprint


def test_second_time_reads_neither_text_nor_tokens(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("some text to prepare, " * 50)
    first = prepare(open_corpus(file), BYTES, tmp_path / "out")
    modified = [entry.stat().st_mtime_ns for entry in os.scandir(tmp_path / "out") if entry.name.endswith(".bin")]

    corpus = open_corpus(file)
    with monkeypatch.context() as patch:
        patch.setattr(type(corpus), "records", lambda self: pytest.fail("read the corpus again"))
        patch.setattr(type(corpus), "fingerprint", property(lambda self: pytest.fail("hashed the corpus again")))
        again = prepare(corpus, BYTES, tmp_path / "out")
    assert again.info == first.info == open_dataset(tmp_path / "out", verify=True).info

    os.utime(file, ns=(1, 1))  # a new clone: other times, same content
    touched = prepare(open_corpus(file), BYTES, tmp_path / "out")
    assert touched.fingerprint == first.fingerprint and touched.info["corpus"]["stamp"] == open_corpus(file).stamp
    assert modified == [e.stat().st_mtime_ns for e in os.scandir(tmp_path / "out") if e.name.endswith(".bin")]


def test_a_different_dataset_is_refused_and_left_alone(tmp_path):
    prepare(MANY, BYTES, tmp_path)
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path)}
    characters = CharTokenizer.fit(MANY)
    for corpus, tokenizer, fraction, message in [
        (MANY, characters, 0.1, "its tokenizer is another one"),
        (MANY, BYTES, 0.2, "its val_fraction is 0.1, not 0.2"),
        (DocumentList("other", ["text"] * 200), BYTES, 0.1, "has other content than other"),
    ]:
        with pytest.raises(FileExistsError, match=f"holds a different dataset: .*{message}"):
            prepare(corpus, tokenizer, tmp_path, val_fraction=fraction)
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path)} == before


def test_a_broken_off_run_leaves_no_dataset_and_can_be_repeated(tmp_path):
    whole = prepare(MANY, BYTES, tmp_path / "whole", shard_tokens=1000)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(MANY, BYTES, tmp_path / "again", shard_tokens=1000, progress=stop)
    with pytest.raises(FileNotFoundError, match=r"dataset\.json is not there"):
        open_dataset(tmp_path / "again")
    (tmp_path / "again" / ".train_099.bin.1.tmp").write_text("left by a killed process")
    again = prepare(MANY, BYTES, tmp_path / "again", shard_tokens=1000)
    assert again.train.fingerprint == whole.train.fingerprint
    assert not list((tmp_path / "again").glob("*.tmp"))


def test_shards_of_another_broken_off_run_are_not_overwritten(tmp_path):
    prepare(MANY, BYTES, tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(FileExistsError, match="is no shard of this dataset"):
        prepare(MANY, CharTokenizer.fit(MANY), tmp_path)
    prepare(MANY, BYTES, tmp_path)


def test_damage_is_named(tmp_path):
    prepare(MANY, BYTES, tmp_path / "a")
    file = tmp_path / "a" / "val_000.bin"
    raw = bytearray(file.read_bytes())
    raw[1500] ^= 4
    file.write_bytes(raw)
    open_dataset(tmp_path / "a")
    with pytest.raises(ShardError, match=r"val_000\.bin: the contents do not match"):
        open_dataset(tmp_path / "a", verify=True)
    prepare(MANY, BYTES, tmp_path / "b", val_fraction=0.3)
    file.write_bytes((tmp_path / "b" / "val_000.bin").read_bytes())
    with pytest.raises(ShardError, match=r"val_000\.bin: belongs to another dataset"):
        open_dataset(tmp_path / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="val_000"):
        open_dataset(tmp_path / "a")
    (tmp_path / "a" / "dataset.json").write_text('{"splits": ')
    with pytest.raises(ShardError, match="not a dataset description"):
        open_dataset(tmp_path / "a")


def test_replaced_bytes_are_in_the_record(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bad \xff byte" * 20)
    with pytest.warns(UserWarning, match="20 invalid"):
        dataset = prepare(open_corpus(tmp_path / "a.txt"), BYTES, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["corpus"]["replaced_utf8"] == 20
    assert dataset.train.text_bytes + dataset.val.text_bytes == 20 * len("bad \ufffd byte".encode())


def test_progress_ends_at_the_size_of_the_corpus(tmp_path):
    calls = []
    prepare(MANY, BYTES, tmp_path, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("tokenising", MANY.size, MANY.size)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_prepare_at_once_agree(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(MANY, BYTES, tmp_path / "out")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert documents_of(open_dataset(tmp_path / "out", verify=True).train)


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        (["text"], 1.0, "val_fraction is 1.0; expected at least 0 and less than 1"),
        ([], 0.1, "leaves the train split without text"),
        (["a"], 0.1, "leaves the train split without text"),
        (["same"] * 200, 0.1, "leaves the val split without text"),
    ],
)
def test_too_little_text_is_refused(tmp_path, documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        prepare(DocumentList("little", documents), BYTES, tmp_path, val_fraction=fraction)
    with pytest.raises(TypeError, match="corpus is list; expected a Corpus"):
        prepare(documents, BYTES, tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.json"))


def test_the_data_layer_imports_without_torch():
    # llmfast itself may import torch: what counts is that the data layer adds no import of its own
    code = (
        "import sys; import llmfast; before = 'torch' in sys.modules; import llmfast.data;"
        "assert ('torch' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
