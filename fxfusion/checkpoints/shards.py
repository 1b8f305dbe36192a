"""Write tensors to safetensors shards with an index, one shard in memory at a time.

    model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, model.safetensors.index.json

Names, shapes and dtypes are known first: they decide the shards. The values then come in any order, and a shard is
written when all of its tensors are there: who gives them in the order of the shards never holds two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfusion.checkpoints.folder import write_file, write_tensors
from fxfusion.errors import CheckpointError
from fxfusion.report.progress import reporting

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "2GB"


def stored_dtypes() -> dict[str, torch.dtype]:
    """What safetensors calls each dtype."""
    from transformers.modeling_utils import str_to_torch_dtype

    return dict(str_to_torch_dtype)


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
        known = set(stored_dtypes().values())
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
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write `model.safetensors`, or shards and their index, into an existing folder.

    Args:
        facts: every tensor that will come, in the order of the files.
        tensors: their values, in any order, on any device.
        max_shard_size: bytes, or text such as `"500MB"`.
        progress: say how far it is, on the error stream.
        notes: texts that every file has in its header.

    Raises:
        CheckpointError: a tensor that is not in `facts`, comes twice, not at all, or in another shape or dtype.
        OSError: the disk is full, or the like.
    """
    layout = ShardLayout.of(facts, max_shard_size)
    places = {one.name: (file, one) for file, group in layout.files.items() for one in group}
    shards: dict[str, dict[str, Tensor]] = {file: {} for file in layout.files}
    taken: dict[str, set[int]] = {file: set() for file in layout.files}
    with reporting(progress, "Writing", layout.nbytes, is_bytes=True) as advance:
        for name, tensor in tensors:
            if name not in places:
                raise CheckpointError(f"{name} is not one of the tensors to write, or comes twice")
            file, expected = places.pop(name)
            if TensorFacts.of(name, tensor) != expected:
                raise CheckpointError(f"{TensorFacts.of(name, tensor)} comes where {expected} was announced")
            shards[file][name] = _alone(tensor, taken[file])
            del tensor
            if len(shards[file]) == len(layout.files[file]):
                write_tensors(folder / file, shards.pop(file), notes)
                advance(sum(one.nbytes for one in layout.files[file]))
        if places:
            raise CheckpointError(f"{next(iter(places))} is missing among the tensors to write")
    index = layout.index()
    if index is not None:
        write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _alone(tensor: Tensor, taken: set[int]) -> Tensor:
    """On the CPU, in memory that no other of its file shares, as safetensors has it; a copy where need be. `taken`:
    where the others lie, and then this one."""
    value = tensor.detach().cpu().contiguous()
    storage = value.untyped_storage()
    if storage.data_ptr() in taken or storage.nbytes() != value.nbytes:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value
