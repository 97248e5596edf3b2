"""GGUF files: their fields, and their tensors as mapped bytes. Dequantisation is the `gguf` package's.

The header is read here because the package's reader makes an array object of every string in it: 3.9 s for a vocabulary
of 49 thousand tokens and their merges, 0.1 s here (one Zen 3 core).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["GGUFFile", "GGUFTensor"]

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
# By type number; structure codes, always little-endian.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` in the order of numpy (the file has it reversed); `kind` is the number of a ``GGMLQuantizationType``."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile:
    """Fields and tensors of a GGUF file by name.

    Attributes:
        path: of the file.
        fields: numbers, strings and lists, under the names in the file.
        tensors: where each lies.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is not GGUF, or cut off.

    Example:
        >>> file = GGUFFile("model.gguf")
        >>> file.fields["general.architecture"], file.read("output_norm.weight").shape
        ('llama', (576,))
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.stat().st_size < len(MAGIC):
            raise ValueError(f"{self.path}: empty, expected a GGUF file")
        self._bytes = np.memmap(self.path, np.uint8, "r")
        self._view = memoryview(self._bytes)
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
            raise ValueError(f"{self.path}: not a whole GGUF file ({error!r} at byte {self._at})") from None

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, or in float16 if the file has it so; what needs no conversion is a read-only view.

        Raises:
            ValueError: the file ends before it, or its quantisation is unknown. ImportError: `gguf` is not installed.
        """
        gguf = _gguf()
        tensor = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ValueError(f"{self.path}: {name} has the unknown type {tensor.kind}") from None
        count = int(np.prod(tensor.shape))
        start = self._data + tensor.offset
        stored = self._bytes[start : start + count // block * block_bytes]
        if len(stored) < count // block * block_bytes:
            raise ValueError(f"{self.path}: ends inside the tensor {name}; the file is truncated")
        plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        if plain is not None:
            return stored.view(plain).reshape(tensor.shape)
        rows = stored.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
        return gguf.quants.dequantize(rows, kind)

    def kind_name(self, name: str) -> str:
        """``F32``, ``Q4_1``, ..."""
        return _gguf().GGMLQuantizationType(self.tensors[name].kind).name

    def _read_header(self) -> None:
        if bytes(self._view[:4]) != MAGIC:
            raise ValueError(f"{self.path}: begins with {bytes(self._view[:4])!r}, expected {MAGIC!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ValueError(f"{self.path}: GGUF version {version}, expected 2 or 3 (little-endian)")
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._scalar("I"))
        self.tensors: dict[str, GGUFTensor] = {}
        for _ in range(tensors):
            name = self._string()
            shape = [self._scalar("Q") for _ in range(self._scalar("I"))]
            self.tensors[name] = GGUFTensor(tuple(reversed(shape)), self._scalar("I"), self._scalar("Q"))
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        self._data = -(-self._at // alignment) * alignment

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._view, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > len(self._view) - self._at:
            raise struct.error("a string longer than the file")
        text = bytes(self._view[self._at : self._at + length]).decode()
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(SCALARS[kind])
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in (STRING, ARRAY):
            return [self._value(kind) for _ in range(count)]
        if count > len(self._view):
            raise struct.error("an array longer than the file")
        values = struct.unpack_from(f"<{count}{SCALARS[kind]}", self._view, self._at)
        self._at += struct.calcsize(f"<{count}{SCALARS[kind]}")
        return list(values)


def _gguf():
    try:
        import gguf
    except ImportError:
        raise ImportError("reading tensors of GGUF files needs the package gguf: pip install 'llmfast[hf]'") from None
    return gguf
