"""Shards that safetensors itself reads, from tensors that come in any order, one at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fxfusion.checkpoints.folder import serialize
from fxfusion.checkpoints.shards import INDEX, SINGLE, ShardLayout, TensorFacts, stored_dtypes, write_shards
from fxfusion.errors import CheckpointError

TENSORS = {
    "matrix": torch.randn(3, 4),
    "number": torch.tensor(3),
    "half": torch.randn(5).bfloat16(),
    "nothing": torch.empty(0, 3),
    "transposed": torch.randn(6, 5).t(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
}


def facts(tensors: dict[str, Tensor]) -> list[TensorFacts]:
    return [TensorFacts.of(name, value) for name, value in tensors.items()]


def read(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(path)
    return found


@pytest.mark.parametrize("size", ["2GB", 50, 1])
def test_what_is_written_is_read_by_safetensors(tmp_path: Path, size: int | str) -> None:
    write_shards(tmp_path, facts(TENSORS), reversed(TENSORS.items()), size)
    found = read(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_one_file_has_no_index_and_several_do(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_shards(tmp_path / "one", facts(TENSORS), TENSORS.items())
    assert [path.name for path in (tmp_path / "one").iterdir()] == [SINGLE]
    write_shards(tmp_path / "two", facts(TENSORS), TENSORS.items(), 100)
    index = json.loads((tmp_path / "two" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())
    assert set(index["weight_map"].values()) == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "two" / file)


@pytest.mark.parametrize("code", sorted(stored_dtypes()))
def test_every_dtype(tmp_path: Path, code: str) -> None:
    value = torch.arange(4).to(stored_dtypes()[code])
    write_shards(tmp_path, [TensorFacts.of("x", value)], [("x", value)])
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.get_slice("x").get_dtype() == code
    assert load_file(tmp_path / SINGLE)["x"].double().equal(value.double())


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    tensors = {"whole": whole, "again": whole, "upper": whole[:2], "lower": whole[2:], "none": whole[:0]}
    write_shards(tmp_path, facts(tensors), tensors.items())
    found = read(tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_file_of_tensors_has_the_rights_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    write_shards(tmp_path, facts(TENSORS), TENSORS.items())
    assert (tmp_path / SINGLE).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_one_shard_is_held_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def made() -> Iterator[tuple[str, Tensor]]:
        seen: list[weakref.ref[Any]] = []
        for name in names:
            alive.append(sum(one() is not None for one in seen))
            value = torch.ones(4)
            seen.append(weakref.ref(value.untyped_storage()))
            yield name, value
            del value

    names = [f"t{number}" for number in range(6)]
    write_shards(tmp_path, [TensorFacts(name, (4,), torch.float32) for name in names], made(), 32)
    assert alive == [0, 1, 0, 1, 0, 1]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Errors of the library become those of the system, which a folder's writer knows."""
    with pytest.raises(OSError, match="No such file"):
        write_shards(tmp_path / "gone", facts(TENSORS), TENSORS.items())
    with pytest.raises(OSError, match=r"error"):
        serialize(tmp_path / "gone" / SINGLE, TENSORS | {"transposed": torch.ones(2)})


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([("a", torch.ones(2))], "b is missing"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "a is not one of the tensors to write, or comes twice"),
        ([("c", torch.ones(2))], "c is not one"),
        ([("a", torch.ones(3))], r"a \[3\] float32 comes where a \[2\] float32 was announced"),
        ([("a", torch.ones(2).double())], "float64 comes where"),
    ],
)
def test_other_tensors_than_announced_are_refused(tmp_path: Path, tensors: list[tuple[str, Tensor]], why: str) -> None:
    announced = [TensorFacts(name, (2,), torch.float32) for name in "ab"]
    with pytest.raises(CheckpointError, match=why):
        write_shards(tmp_path, announced, tensors)


@pytest.mark.parametrize("size", [0, -1, "2 apples", "GB", ""])
def test_a_bad_size_is_refused(size: int | str) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size"):
        ShardLayout.of(facts(TENSORS), size)


def test_bad_facts_are_refused() -> None:
    one = TensorFacts("a", (2,), torch.float32)
    with pytest.raises(CheckpointError, match="a is there twice"):
        ShardLayout.of([one, TensorFacts("a", (3,), torch.float32)])
    with pytest.raises(CheckpointError, match="no tensor to write"):
        ShardLayout.of([])
    with pytest.raises(CheckpointError, match="safetensors has no torch.complex128"):
        ShardLayout.of([TensorFacts("a", (2,), torch.complex128)])


def test_progress_counts_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, facts(TENSORS), TENSORS.items(), progress=True)
    total = sum(value.nbytes for value in TENSORS.values())
    assert f"Writing: {total}/{total} bytes (100 %)" in capsys.readouterr().err
