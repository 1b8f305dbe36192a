"""Write tensors to safetensors shards with an index, one tensor in memory at a time.

    model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json

Names, shapes and dtypes are known first: they decide the shards and the place of each tensor in its file. The values
then come in any order. (`safetensors.torch.save_file` needs all tensors of a file at once, which for a model that
is written in one file is a second copy of it.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fxfusion.checkpoints import folder as disk
from fxfusion.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "2GB"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls each dtype."""

_CHUNK = 2**26  # bytes written at a time


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a file says about a tensor before its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorFacts:
        return cls(name, tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Which tensors lie in which file, in the order of the tensors."""

    files: dict[str, tuple[TensorFacts, ...]]

    @classmethod
    def of(cls, tensors: Sequence[TensorFacts], max_shard_size: int | str = DEFAULT_SHARD_SIZE) -> ShardLayout:
        """Files of at most `max_shard_size` bytes (or text such as "500MB"), more only where one tensor has more.

        Raises `CheckpointError` for a bad size, no tensor, a tensor twice, and a dtype that safetensors lacks.
        """
        from huggingface_hub import split_state_dict_into_shards_factory

        facts = {one.name: one for one in tensors}
        known = set(DTYPES.values())
        for one in tensors:
            if one.dtype not in known:
                raise CheckpointError(f"{one.name}: safetensors has no {one.dtype}")
        if not facts or len(facts) != len(tensors):
            repeated = [one.name for one in tensors if facts[one.name] is not one]
            raise CheckpointError(f"{repeated[0]} is there twice" if repeated else "there is no tensor to write")
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise CheckpointError(f"max_shard_size is {max_shard_size}: expected bytes, or text such as '2GB'")
        try:
            split = split_state_dict_into_shards_factory(
                facts,
                get_storage_size=lambda one: one.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise CheckpointError(f"max_shard_size is {max_shard_size!r}: {error}") from None
        return cls({file: tuple(facts[name] for name in names) for file, names in split.filename_to_tensors.items()})

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for tensors in self.files.values() for one in tensors)

    def index(self) -> dict[str, Any] | None:
        """The content of `model.safetensors.index.json`; None where there is one file."""
        if len(self.files) == 1:
            return None
        places = {one.name: file for file, tensors in self.files.items() for one in tensors}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(places.items()))}


def write_shards(
    folder: Path,
    facts: Sequence[TensorFacts],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: bool = False,
) -> None:
    """Write `model.safetensors`, or shards and their index, into an existing folder.

    Args:
        facts: every tensor that will come, in the order of the files.
        tensors: their values, in any order, on any device; each is let go before the next is taken.
        max_shard_size: bytes, or text such as `"500MB"`.
        progress: show a progress bar.

    Raises:
        CheckpointError: a tensor that is not in `facts`, comes twice, not at all, or in another shape or dtype.
        OSError: the disk is full, or the like.
    """
    layout = ShardLayout.of(facts, max_shard_size)
    places = {one.name: (file, one) for file, group in layout.files.items() for one in group}
    with ExitStack() as stack:
        advance = stack.enter_context(byte_bar(progress, "Writing", layout.nbytes))
        shards: dict[str, _ShardFile] = {}
        for name, tensor in tensors:
            if name not in places:
                raise CheckpointError(f"{name} is not one of the tensors to write, or comes twice")
            file, expected = places.pop(name)
            if TensorFacts.of(name, tensor) != expected:
                raise CheckpointError(f"{TensorFacts.of(name, tensor)} comes where {expected} was announced")
            if file not in shards:
                shards[file] = _ShardFile.start(folder / file, layout.files[file])
                stack.callback(shards[file].file.close)
            shards[file].put(expected, tensor, advance)
            if not shards[file].missing:
                shards.pop(file).file.close()
        if places:
            raise CheckpointError(f"{next(iter(places))} is missing among the tensors to write")
    index = layout.index()
    if index is not None:
        disk.write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


@dataclass(slots=True)
class _ShardFile:
    """One file being written: `starts` says where each tensor begins."""

    file: IO[bytes]
    starts: dict[str, int]
    missing: set[str] = field(default_factory=set)

    @classmethod
    def start(cls, path: Path, tensors: Sequence[TensorFacts]) -> _ShardFile:
        """Eight bytes with the length of the header, the header, then the values without gaps, widest dtype first
        so that each is aligned."""
        codes = {dtype: code for code, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for one in sorted(tensors, key=lambda one: -one.dtype.itemsize):
            offsets = [position, position + one.nbytes]
            header[one.name] = {"dtype": codes[one.dtype], "shape": list(one.shape), "data_offsets": offsets}
            position += one.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        starts = {one.name: base + header[one.name]["data_offsets"][0] for one in tensors}
        file = disk.create(path)
        disk.write(file, len(text).to_bytes(8, "little") + text)
        return cls(file, starts, set(starts))

    def put(self, facts: TensorFacts, tensor: Tensor, advance: Callable[[int], None]) -> None:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.file.seek(self.starts[facts.name])
        for begin in range(0, facts.nbytes, _CHUNK):
            part = values[begin : begin + _CHUNK]
            disk.write(self.file, part.data)
            advance(len(part))
        self.missing.discard(facts.name)


@contextmanager
def byte_bar(shown: bool, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """`advance(bytes)` of a bar on the error stream, or of nothing."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
