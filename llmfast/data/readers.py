"""The documents of one file: UTF-8 text, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

Record = tuple[int, str, int]
"""Position in the file (bytes read so far), document (perhaps empty), invalid sequences replaced in it."""

_SURROGATES = re.compile("[\ud800-\udfff]")


def to_text(raw: bytes | str) -> tuple[str, int]:
    """Valid Unicode text and how many invalid sequences became U+FFFD (also lone surrogates, which JSON can carry)."""
    if isinstance(raw, str):
        try:
            raw.encode()
            return raw, 0
        except UnicodeEncodeError:
            return _SURROGATES.subn("\ufffd", raw)
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")  # those that were in the text already


def refuse_binary(file: Path) -> None:
    """ValueError for a file that does not start as UTF-8 text does: UTF-16, an archive, a picture."""
    with open(file, "rb") as stream:
        if b"\0" in stream.read(1 << 13):
            raise ValueError(f"corpus {str(file)!r}: holds NUL bytes; expected UTF-8 text, not binary data or UTF-16")


def read_text(file: Path, separator: str | None) -> Iterator[Record]:
    """The whole file, or what stands between separators; a byte order mark is dropped. ValueError if it is not text."""
    if "\0" not in (separator or ""):
        refuse_binary(file)
    if separator is None:
        raw = file.read_bytes()
        yield len(raw), *to_text(raw.removeprefix(codecs.BOM_UTF8))
        return
    if file.stat().st_size == 0:  # which mmap refuses
        return
    mark = separator.encode()
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        start = len(codecs.BOM_UTF8) if view[:3] == codecs.BOM_UTF8 else 0
        while (stop := view.find(mark, start)) >= 0:
            yield stop, *to_text(view[start:stop])
            start = stop + len(mark)
        yield len(view), *to_text(view[start:])


def read_jsonl(file: Path, field: str) -> Iterator[Record]:
    """String `field` of the object on each line; blank lines are passed over. ValueError names file and line."""
    position = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            position += len(line)
            if not line.strip():
                continue
            source, replaced = to_text(line.removeprefix(codecs.BOM_UTF8))
            try:
                record = json.loads(source)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON ({error}); expected one object a line") from None
            if not isinstance(record, dict) or field not in record:
                fields = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{file}:{number}: no field {field!r} (text_field); the line has {fields}")
            value = record[field]
            if not isinstance(value, str | None):
                raise ValueError(f"{file}:{number}: field {field!r} is {type(value).__name__}; expected a string")
            text, more = to_text(value or "")
            yield position, text, replaced + more


def read_parquet(file: Path, column: str) -> Iterator[Record]:
    """String `column`, batch by batch. ImportError without pyarrow; ValueError for a bad file or column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"reading {file} needs the package pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from None
    with table:
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(f"{file}: no column {column!r} (text_field); the file has {', '.join(map(repr, names))}")
        size, n_rows, done = file.stat().st_size, table.metadata.num_rows, 0
        kind = table.schema_arrow.field(column).type
        is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if not is_text and not (pyarrow.types.is_dictionary(kind) and pyarrow.types.is_string(kind.value_type)):
            raise ValueError(f"{file}: column {column!r} is {kind}; expected strings")
        size, n_rows, done = file.stat().st_size, table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            # through bytes: Parquet does not promise that its strings are valid UTF-8
            for value in batch.column(0).cast(pyarrow.string()).cast(pyarrow.binary()).to_pylist():
                done += 1
                yield size * done // n_rows, *to_text(value or b"")
