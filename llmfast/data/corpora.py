"""Corpora: named, fingerprinted sources of documents (str).

`open_corpus` accepts the word ``stdlib`` (the running Python's own library sources, always there), a text file, a
folder, a glob, a JSONL file or a Parquet file. A corpus can be iterated any number of times and gives the same
documents in the same order each time; empty documents are left out.
"""

from __future__ import annotations

import glob
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from .files import fingerprint_of, new_digest
from .readers import Record, read_jsonl, read_parquet, read_text, refuse_binary, to_text

PROSE_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml"})
CODE_SUFFIXES = frozenset(
    {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh"}
)
TEXT_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})

# Tests are mostly tables of odd literals, and what sits in site-packages differs from machine to machine.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Corpus:
    """An ordered set of documents read from files.

    Attributes: `name`, for people; `files`; `size`, the bytes of all files (not of the text, for Parquet);
    `fingerprint`, of the content: the same on every machine; `stamp`, of paths, sizes and modification times: the
    cheap hint that nothing changed since. Iterating yields str and returns a `Documents`, which knows its progress.

    Example::

        corpus = open_corpus("books/", separator="<|endoftext|>")
        longest = max(corpus, key=len)
    """

    def __init__(self, name: str, files: Iterable[Path], *, text_field: str = "text", separator: str | None = None):
        self.name = name
        self.files = tuple(files)
        self.text_field = text_field
        self.separator = separator
        self.size = sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Documents:
        return Documents(self)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self.files)} files, {self.size:,} bytes)"

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of what is read and how; costs one pass over the bytes the first time."""
        digest = new_digest()
        for file in self.files:
            digest.update(f"{self._how(file)}:{file.stat().st_size}\n".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def stamp(self) -> str:
        """32 hex digits of paths, sizes and modification times; costs one stat a file."""
        states = [(self._how(file), str(file.resolve()), file.stat()) for file in self.files]
        return fingerprint_of([(how, path, stat.st_size, stat.st_mtime_ns) for how, path, stat in states])

    def records(self) -> Iterator[tuple[Path, int, str, int]]:
        """(file, bytes of the corpus read so far, document, replaced sequences), empty documents included."""
        before = 0
        for file in self.files:
            for position, text, replaced in self._read(file):
                yield file, before + position, text, replaced
            before += file.stat().st_size

    def _how(self, file: Path) -> str:
        kind = _kind(file)
        return f"text {self.separator!r}" if kind == "text" else f"{kind} {self.text_field!r}"

    def _read(self, file: Path) -> Iterator[Record]:
        kind = _kind(file)
        if kind == "jsonl":
            return read_jsonl(file, self.text_field)
        if kind == "parquet":
            return read_parquet(file, self.text_field)
        return read_text(file, self.separator)


class DocumentList(Corpus):
    """A corpus held in memory.

    Example::

        corpus = DocumentList("notes", ["first note", "second note"])
    """

    def __init__(self, name: str, documents: Iterable[str]):
        super().__init__(name, ())
        self.documents = tuple(documents)
        self.size = sum(len(document.encode("utf-8", "replace")) for document in self.documents)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.documents)

    @property
    def stamp(self) -> str:
        return self.fingerprint

    def records(self) -> Iterator[tuple[Path, int, str, int]]:
        position = 0
        for document in self.documents:
            text, replaced = to_text(document)
            position += len(text.encode())
            yield Path(self.name), position, text, replaced


class Documents(Iterator[str]):
    """One pass over a corpus. `bytes_read` of `corpus.size` are behind it; `replaced` counts invalid sequences."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.bytes_read = 0
        self.replaced = 0
        self._first_replaced: Path | None = None
        self._records = corpus.records()

    def __next__(self) -> str:
        while (record := next(self._records, None)) is not None:
            file, self.bytes_read, text, replaced = record
            if replaced:
                self.replaced += replaced
                self._first_replaced = self._first_replaced or file
            if text:
                return text
        if self._first_replaced is not None:
            warnings.warn(
                f"corpus {self.corpus.name!r}: {self.replaced} invalid UTF-8 sequences were replaced by U+FFFD, "
                f"the first in {self._first_replaced}",
                stacklevel=2,
            )
            self._first_replaced = None
        raise StopIteration


def open_corpus(spec: str | os.PathLike | Corpus, text_field: str = "text", separator: str | None = None) -> Corpus:
    """The corpus that `spec` names.

    `spec`: ``"stdlib"``; a file: ``.jsonl``/``.ndjson``, ``.parquet``, anything else is UTF-8 text; a folder: its
    text, JSONL or Parquet files (one of the three), recursively, sorted by path, hidden ones left out; a glob with
    ``**`` for "any depth"; or a `Corpus`, returned as it is. `text_field` is the JSONL field or Parquet column that
    holds the text (null counts as empty). `separator` cuts text files into documents; without one a file is one.

    Errors: FileNotFoundError when there is nothing; ValueError for a folder of mixed kinds or a file that is not text.
    Malformed JSON, a missing field or column raise ValueError with file and line while iterating.

    Example::

        for document in open_corpus("reviews.jsonl", text_field="body"): ...
    """
    if isinstance(spec, Corpus):
        return spec
    if separator == "":
        raise ValueError("separator is empty; expected None or at least one character")
    name = os.fspath(spec)
    path = Path(name)
    if name == "stdlib":
        return _standard_library()
    if path.is_file():
        _refuse_other_files(path)
        files = [path]
    elif path.is_dir():
        files = _files_below(path)
    else:
        files = sorted(Path(file) for file in glob.glob(name, recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(f"corpus {name!r}: expected 'stdlib', or an existing file, folder or glob")
    return Corpus(name, files, text_field=text_field, separator=separator)


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, {".py"}, STDLIB_LEFT_OUT)
    if not files:
        raise FileNotFoundError(f"corpus 'stdlib': no .py files in {root}; this Python came without its sources")
    return Corpus(f"Python {platform.python_version()} standard library", files)


def _files_below(folder: Path) -> list[Path]:
    files = _walk(folder, TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES, frozenset({"__pycache__"}))
    kinds = sorted({_kind(file) for file in files})
    if not files:
        suffixes = " ".join(sorted(TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES))
        raise FileNotFoundError(f"corpus {str(folder)!r}: the folder holds no file ending in one of {suffixes}")
    if len(kinds) > 1:
        raise ValueError(
            f"corpus {str(folder)!r}: the folder mixes {' and '.join(kinds)} files; expected one kind, "
            f"so name it with a glob such as {str(folder / '**' / ('*' + files[0].suffix))!r}"
        )
    return files


def _walk(root: Path, suffixes: Iterable[str], left_out: frozenset[str]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        files = [Path(folder, name) for name in names if Path(name).suffix.lower() in suffixes and name[0] != "."]
        found += [file for file in files if file.is_file()]  # a pipe would be waited for
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return "jsonl" if suffix in JSONL_SUFFIXES else "parquet" if suffix in PARQUET_SUFFIXES else "text"


def _refuse_other_files(file: Path) -> None:
    if file.suffix.lower() == ".json":
        raise ValueError(f"corpus {str(file)!r}: expected JSON lines in a .jsonl file, one object a line, not .json")
    if _kind(file) != "parquet":
        refuse_binary(file)
