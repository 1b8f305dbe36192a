"""The header of a GGUF file: names, shapes and types of tensors, and settings, all of it checked and no value read.

    "GGUF", version, counts | settings: name, type, value | tensors: name, shape, type, place | padding | values

The file need not be trusted: no code is in it, and every count and length is compared with the file's size before
memory is taken. It imports nothing heavy, so that a command can say what is wrong with a file at once.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fxfusion.errors import CheckpointError

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_AXES = 8
# Types of values: those of one size, by their number.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file that says it is a GGUF file, by its name or by its first bytes."""
    where = Path(path)
    try:
        if not where.is_file():
            return False
        if where.suffix.lower() == SUFFIX:
            return True
        with open(where, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """What the header says of a tensor. `shape` as in torch; `kind`: its type, such as `"Q4_1"`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file. `metadata`: its settings by name; of an array of strings only how many they are."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Read and check the header, and no value of a tensor.

        Raises `CheckpointError` that names the file and what to do: no GGUF file, cut short, one of several, no text
        model, a quantisation that cannot be read, or the package `gguf` is missing.
        """
        require("gguf")
        try:
            facts = os.stat(path)
            return _read(Path(path), facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            raise CheckpointError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from error

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def types(self) -> list[str]:
        """The types of its tensors, that of most values first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.kind] += math.prod(tensor.shape)
        return [kind for kind, _ in sizes.most_common()]

    @property
    def dtype(self) -> str:
        """What the weights are read as: float32 where some are quantised, else what most of them are."""
        return "float32" if self.quantised else _FLOATS[self.types[0]]

    @property
    def quantised(self) -> bool:
        return not set(self.types) <= _FLOATS.keys()

    def told(self, dtype: object = None) -> str:
        """What it is, in a line: `model.gguf: llama, Q4_1 (also F32)`; with `dtype`, also what its weights become."""
        first, *others = self.types
        also = f" (also {', '.join(others)})" if others else ""
        line = f"{self.path}: {self.architecture}, {first}{also}"
        if dtype is None:
            return line
        how = "dequantised to" if self.quantised else "read as"
        return f"{line}; weights {how} {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=4)
def _read(path: Path, size: int, written: int) -> GgufFile:
    """Once while the file stays as it is: a command asks for its header again and again."""
    with open(path, "rb") as file:
        _check_magic(path, file.read(64))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            metadata, tensors = _Header(path, content).read()
    found = GgufFile(path, metadata, tensors)
    _check_kind(found)
    _check_types(found)
    return found


class _Header:
    """Reads a header in order. Counts and lengths are compared with what is left of the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.place, self.size = path, content, len(MAGIC), len(content)

    def read(self) -> tuple[dict[str, Any], tuple[GgufTensor, ...]]:
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            which = "big-endian" if swapped in _VERSIONS else f"of version {version}"
            raise CheckpointError(f"{self.path} is a GGUF file {which}; version 2 and 3, little-endian, are read")
        tensors, settings = self.count(24), self.count(12)
        metadata: dict[str, Any] = {}
        for _ in range(settings):
            name = self.text()
            if name in metadata:
                raise self.broken(f"{name} is there twice")
            metadata[name] = self.value(self.number("I"))
        return metadata, tuple(self.tensors(tensors, metadata.get("general.alignment", _ALIGNMENT)))

    def tensors(self, count: int, alignment: Any) -> Iterator[GgufTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if not isinstance(alignment, int) or alignment < 1:
            raise self.broken(f"general.alignment is {alignment!r}")
        sizes = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
        found, names = list[tuple[str, tuple[int, ...], str, int, int]](), set[str]()
        for _ in range(count):
            name, axes = self.text(), self.number("I")
            if name in names or axes > _MAX_AXES:
                raise self.broken(f"tensor {name} {'is there twice' if name in names else f'has {axes} axes'}")
            names.add(name)
            shape = tuple(reversed(self.numbers(f"{axes}Q")))
            kind, offset = self.number("I"), self.number("Q")
            known, block, nbytes = sizes.get(kind, (f"type {kind}", 1, 0))
            if shape and shape[-1] % block:
                raise self.broken(f"{name} has rows of {shape[-1]} values, and {known} comes in blocks of {block}")
            found.append((name, shape, known, offset, math.prod(shape) // block * nbytes))
        start = -(-self.place // alignment) * alignment
        for name, shape, known, offset, nbytes in found:
            end = start + offset + nbytes
            if end > self.size:
                raise CheckpointError(
                    f"{self.path} is cut short: {name} ends at byte {end}, and the file has {self.size}; fetch it anew"
                )
            yield GgufTensor(name, shape, known, nbytes)

    def value(self, kind: int) -> Any:
        """A setting; for an array of strings, which are vocabularies, their number."""
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _STRING:
            return self.text()
        inner = self.number("I") if kind == _ARRAY else None
        if inner == _STRING:
            count = self.count(8)
            for _ in range(count):
                self.skip(self.number("Q"))
            return count
        if inner in _FORMATS:
            form = _FORMATS[inner]
            return list(self.numbers(f"{self.count(struct.calcsize(form))}{form}"))
        raise self.broken(f"a setting has the type {kind if inner is None else f'array of type {inner}'}")

    def numbers(self, form: str) -> tuple[Any, ...]:
        place = self.place
        self.skip(struct.calcsize(f"<{form}"))
        return struct.unpack_from(f"<{form}", self.content, place)

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def count(self, least: int) -> int:
        """How many there are, of at least so many bytes each."""
        found = int(self.number("Q"))
        if found * least > self.size - self.place:
            raise self.cut()
        return found

    def text(self) -> str:
        length, place = self.number("Q"), self.place
        self.skip(length)
        try:
            return self.content[place : place + length].decode()
        except UnicodeDecodeError:
            raise self.broken(f"the text at byte {place} is not UTF-8") from None

    def skip(self, length: int) -> None:
        if length > self.size - self.place:
            raise self.cut()
        self.place += length

    def cut(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is cut short, or broken: its header ends after the file; fetch it anew")

    def broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is broken: {why}; fetch it anew")


def _check_magic(path: Path, start: bytes) -> None:
    if start.startswith(MAGIC):
        return
    if not start:
        raise CheckpointError(f"{path} is empty; fetch it anew")
    hint = " but a pointer of Git LFS: fetch the file itself (git lfs pull)" if b"git-lfs" in start else ""
    raise CheckpointError(f"{path} is no GGUF file{hint or f': it begins with {start[:4]!r}, not with {MAGIC!r}'}")


def _check_kind(file: GgufFile) -> None:
    """Raises where the file is a part, or is no model."""
    parts = file.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"{file.path} is one of {parts} files: make them one first (llama-gguf-split --merge)")
    if not isinstance(file.metadata.get("general.architecture"), str):
        raise CheckpointError(f"{file.path} is broken: it names no general.architecture; fetch it anew")
    kind = file.metadata.get("general.type", "model")
    if kind != "model" or not file.tensors:
        what = "a vocabulary" if not file.tensors else f"of the type {kind!r} (general.type)"
        raise CheckpointError(f"{file.path} is {what}, not a model: give the file of the model itself")
    if not any(tensor.name.startswith("token_embd.") for tensor in file.tensors):
        raise CheckpointError(
            f"{file.path} is no text model: {file.architecture!r}, without an embedding of tokens (token_embd)"
        )


def _check_types(file: GgufFile) -> None:
    """Raises where the package cannot turn a type of its tensors into floats, as it does with no value at all."""
    from importlib.metadata import version

    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    unread = []
    for kind in file.types:
        try:
            which = GGMLQuantizationType[kind]
            dequantize(np.zeros((1, GGML_QUANT_SIZES[which][1]), np.uint8), which)
        except (KeyError, NotImplementedError, ValueError, TypeError):
            unread.append(kind)
    if unread:
        first = next(tensor.name for tensor in file.tensors if tensor.kind == unread[0])
        raise CheckpointError(
            f"{file.path} has tensors of {', '.join(unread)} ({first}, ...), which the package gguf "
            f"{version('gguf')} cannot dequantise: take a newer one, or a file of another quantisation (such as Q8_0)"
        )


def require(package: str) -> None:
    if find_spec(package) is None:
        raise CheckpointError(
            f"a GGUF file is read with the package {package}, which is not installed: pip install 'fxfusion[real]'"
        )
