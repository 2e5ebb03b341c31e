"""The GGUF container (versions 2 and 3): metadata and where each tensor lies.

Layout: magic, version, tensor count, metadata count, metadata entries (key, type, value), tensor entries
(name, dimensions, type, offset), padding to the alignment, tensor data. Every length read from the file is
checked against what is left of it before anything is allocated or stepped over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from rvllm.errors import ModelError
from rvllm.weights.checkpoint import TensorType
from rvllm.weights.gguf.blocks import stored_nbytes
from rvllm.weights.mapped import MappedFile, check_layout, map_file, shown

MAGIC = b"GGUF"
MAX_NAME_BYTES = 1 << 16
MAX_RANK = 4
MAX_ELEMENTS = 1 << 48
MAX_ALIGNMENT = 1 << 20

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9

_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
          10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
          39: "MXFP4"}  # fmt: skip
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
                19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16",
                26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"}  # fmt: skip


class Strings(Sequence[str]):
    """An array of strings in a file, decoded when first looked at.

    A vocabulary has hundreds of thousands of them, and most who open a model never read it. Bytes that are
    not UTF-8 (rare, but found in the wild) become surrogate escapes.
    """

    def __init__(self, data: bytes, count: int) -> None:
        self._data = data
        self._count = count
        self._decoded: list[str] | None = None

    def _all(self) -> list[str]:
        if self._decoded is None:
            data, position, decoded = self._data, 0, []
            unpack = struct.Struct("<Q").unpack_from
            for _ in range(self._count):
                start = position + 8
                position = start + unpack(data, position)[0]
                decoded.append(data[start:position].decode("utf-8", "surrogateescape"))
            self._decoded, self._data = decoded, b""
        return self._decoded

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._all()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Strings({self._count})"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor under its name in the file; `shape` is row-major (the file's dimensions reversed).

    type: None where we do not read the file's type; `type_name` is what to call it.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType | None
    type_name: str
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed and validated GGUF file.

    metadata: by key; numbers as int, float or bool, text as str, arrays of numbers as NumPy arrays, arrays
    of text as `Strings`, arrays of arrays as lists.
    """

    file: MappedFile
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Parses and checks a GGUF file; ModelError names the file and the field that is wrong."""
    return _Reader(map_file(path)).read()


class _Reader:
    """A cursor over the header that cannot leave the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.path = file.path
        self.data = file.bytes.data
        self.size = file.size
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.path}: {problem}")

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes."""
        if count > self.size - self.position:
            self.fail(f"{what} needs {count} bytes, the file has {self.size - self.position} left; "
                      "it is truncated or damaged, fetch it again")  # fmt: skip
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def number(self, kind: int, what: str) -> Any:
        dtype = np.dtype(_NUMBERS[kind])
        raw = self.take(dtype.itemsize, what)
        return bool(raw[0]) if kind == 7 else np.frombuffer(raw, dtype)[0].item()

    def count(self, each: int, what: str) -> int:
        """A count of things of at least `each` bytes, which must fit in what is left of the file."""
        value: int = self.number(10, what)
        if value * each > self.size - self.position:
            self.fail(f"{what} is {value}, more than the rest of the file can hold; "
                      "it is truncated or damaged, fetch it again")  # fmt: skip
        return value

    def name(self, what: str) -> str:
        length = self.count(1, f"length of {what}")
        if length > MAX_NAME_BYTES:
            self.fail(f"{what} is {length} bytes long, which is absurd")
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(kind, key)
        if kind == _STRING:
            return self.text(self.count(1, f"length of {key}"), key)
        if kind != _ARRAY:
            self.fail(f"{key} has the unknown value type {kind}")
        inner = self.number(4, f"element type of {key}")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            count = self.count(dtype.itemsize, f"length of {key}")
            return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if inner == _STRING:
            return self.strings(self.count(8, f"length of {key}"), key)
        if inner != _ARRAY or depth >= 2:
            self.fail(f"{key} is an array of the unknown or too deeply nested type {inner}")
        return [self.value(_ARRAY, key, depth + 1) for _ in range(self.count(12, f"length of {key}"))]

    def strings(self, count: int, key: str) -> Strings:
        """Steps over an array of strings: only the lengths are read here."""
        start = position = self.position
        data, limit, unpack = self.data, self.size - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > limit:
                self.fail(f"{key} runs over the end of the file; it is truncated or damaged, fetch it again")
            position += 8 + unpack(data, position)[0]
        return Strings(bytes(self.take(position - start, key)), count)

    def read(self) -> GGUFFile:
        if bytes(self.data[:4]) != MAGIC:
            self.fail(f"not a GGUF file: it starts with {bytes(self.data[:4])!r} instead of {MAGIC!r}")
        self.position = 4
        version = self.number(4, "version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (a big-endian file)" if swapped in (2, 3) else ""
            self.fail(f"GGUF version {version}{hint} is not supported; versions 2 and 3 are")
        tensor_count = self.count(24, "tensor count")
        metadata = self.metadata(self.count(12, "metadata count"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"general.alignment is {shown(alignment)}, not a power of two")
        entries = [self.entry() for _ in range(tensor_count)]
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                self.fail(f"tensor {shown(name)} is listed twice")
            if offset % alignment:
                self.fail(f"tensor {shown(name)} has offset {offset}, not a multiple of {alignment}")
            tensors[name] = self.tensor(name, shape, kind, start + offset)
        check_layout(
            self.path, ((t.offset, t.offset + t.nbytes, t.name) for t in tensors.values()), self.size
        )
        return GGUFFile(self.file, version, metadata, tensors)

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.name("a metadata key")
            if key in found:
                self.fail(f"metadata key {shown(key)} is given twice")
            found[key] = self.value(self.number(4, f"type of {shown(key)}"), shown(key))
        return found

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, row-major shape, type number, offset) of the next tensor."""
        name = self.name("a tensor name")
        rank = self.number(4, f"rank of tensor {shown(name)}")
        if rank > MAX_RANK:
            self.fail(f"tensor {shown(name)} has {rank} dimensions, at most {MAX_RANK} are possible")
        sizes: list[int] = [self.number(10, f"shape of tensor {shown(name)}") for _ in range(rank)]
        elements = 1
        for n in sizes:
            elements *= n
            if n > MAX_ELEMENTS or elements > MAX_ELEMENTS:
                self.fail(f"tensor {shown(name)} has the absurd shape {shown(sizes)}")
        kind = self.number(4, f"type of tensor {shown(name)}")
        return name, tuple(reversed(sizes)), kind, self.number(10, f"offset of tensor {shown(name)}")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        if kind not in _TYPES:
            if kind not in _OTHER_TYPES:
                self.fail(f"tensor {shown(name)} has the unknown type {kind}")
            # Its size is not known to us; that it starts within the file is all that can be checked.
            return GGUFTensor(name, shape, None, _OTHER_TYPES[kind], offset, 0)
        readable = TensorType[_TYPES[kind]]
        try:
            nbytes = stored_nbytes(readable, shape)
        except ValueError as error:
            self.fail(f"tensor {shown(name)}: {error}")
        return GGUFTensor(name, shape, readable, readable.value, offset, nbytes)


def as_list(value: Any) -> list[Any]:
    """A metadata array, of whatever kind, as a list of Python values."""
    if isinstance(value, np.ndarray):
        numbers: NDArray[Any] = value
        return list(numbers.tolist())
    return list(value)
