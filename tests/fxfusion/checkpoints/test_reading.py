"""Folders that nobody vouches for: each bad one is refused by a message that names the file, before memory is taken."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder
from fxfusion.checkpoints.shards import INDEX, SINGLE, TensorFacts
from fxfusion.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0).bfloat16()}
EXPECTED = [TensorFacts.of(name, value) for name, value in TENSORS.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index."""
    path = tmp_path / "model"
    path.mkdir()
    save_file({"a": TENSORS["a"]}, path / FIRST)
    save_file({"b": TENSORS["b"]}, path / SECOND)
    write_index(path, {"a": FIRST, "b": SECOND})
    return path


def write_index(path: Path, places: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def single(path: Path, tensors: dict[str, Tensor]) -> None:
    for old in path.iterdir():
        old.unlink()
    save_file(tensors, path / SINGLE)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def open_and_check(path: Path) -> None:
    CheckpointReader.open(path).check(EXPECTED)


def test_a_good_folder_is_read(folder: Path) -> None:
    reader = CheckpointReader.open(folder)
    reader.check(EXPECTED)
    for name, value in TENSORS.items():
        assert torch.equal(reader.read(name), value) and reader.read(name).dtype == value.dtype
    single(folder, TENSORS)
    open_and_check(folder)


def test_another_precision_is_expected_too(folder: Path) -> None:
    CheckpointReader.open(folder).check([TensorFacts(one.name, one.shape, torch.float16) for one in EXPECTED])


def cut(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-3])


def twice(folder: Path) -> None:
    save_file(TENSORS, folder / SECOND)


def outside(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / SECOND)
    write_index(folder, {"a": FIRST, "b": f"../{SECOND}"})


def absolute(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": str(folder / SECOND)})


def link_out(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / "secret.safetensors")
    (folder / SECOND).symlink_to("../secret.safetensors")


def link_to_index_outside(folder: Path) -> None:
    (folder / INDEX).rename(folder.parent / "index.json")
    (folder / INDEX).symlink_to(folder.parent / "index.json")


def pipe(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)


def pickle_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickle_in_index(folder: Path) -> None:
    write_index(folder, {"a": FIRST, "b": "pytorch_model.bin"})


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (3,)


BAD: list[tuple[Callable[[Path], None], str]] = [
    (cut, f"{SECOND} cannot be read: .*not fully covered"),
    (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
    (lambda folder: (folder / INDEX).unlink(), f"neither {SINGLE} nor {INDEX}"),
    (twice, f"a is both in {FIRST} and in .*{SECOND}"),
    (outside, f"names the file '../{SECOND}'"),
    (absolute, f"names the file '/.*{SECOND}'"),
    (lambda folder: write_index(folder, {"a": FIRST, "b": "x\0.safetensors"}), "names the file"),
    (link_out, f"{SECOND} is a link that leads out of the folder"),
    (link_to_index_outside, f"{INDEX} is a link that leads out"),
    (pipe, f"{SECOND} is no file"),
    (pickle_only, "pytorch_model.bin is a pickle.*never read"),
    (pickle_in_index, "'pytorch_model.bin', which is no safetensors file"),
    (lambda folder: write_index(folder, {"a": FIRST, "b": FIRST}), f"{FIRST} lacks b"),
    (lambda folder: write_index(folder, {}), f"{INDEX} has no weight_map"),
    (lambda folder: write_index(folder, {"a": 3}), f"{INDEX} puts a into 3"),
    (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} cannot be read as JSON"),
    (lambda folder: (folder / INDEX).write_text("[" * 10**5), f"{INDEX} cannot be read as JSON"),
    (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX} holds a list"),
    (lambda folder: (folder / SECOND).write_bytes(b""), f"{SECOND} cannot be read.*header too small"),
    (lambda folder: (folder / SECOND).write_bytes(raw({}, length=2**50)), f"{SECOND} cannot be read.*header too large"),
    (lambda folder: (folder / SECOND).write_bytes(raw("x" * 9)), f"{SECOND} cannot be read"),
    (
        lambda folder: save_file({"b": TENSORS["b"][:3]}, folder / SECOND),
        rf"{SECOND}: b is \[3\], the model's is \[4\]",
    ),
    (lambda folder: save_file({"b": torch.arange(4)}, folder / SECOND), f"{SECOND}: b is torch.int64"),
    (lambda folder: single(folder, {"a": TENSORS["a"]}), "lacks the tensor b"),
    (lambda folder: single(folder, {**TENSORS, "c": torch.ones(1)}), f"{SINGLE}: c is no tensor of the model"),
    (lambda folder: single(folder, {"a": TENSORS["a"], "c": torch.ones(1)}), "lacks the tensor b; it has c"),
]


@pytest.mark.parametrize(("spoil", "why"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_folder_is_refused_by_name(folder: Path, spoil: Callable[[Path], None], why: str) -> None:
    open_and_check(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=f"(?s){why}"):
        open_and_check(folder)


@pytest.mark.parametrize("shape", [[2**40], [2**33, 2**33], [-1]])
def test_a_shape_that_the_file_cannot_hold_takes_no_memory(folder: Path, shape: list[int]) -> None:
    header = {"b": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    (folder / SECOND).write_bytes(raw(header, b"1234"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=SECOND):
        open_and_check(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_a_dtype_without_a_torch_counterpart_is_named(folder: Path) -> None:
    header = {"b": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    (folder / SECOND).write_bytes(raw(header, b"1234"))
    with pytest.raises(CheckpointError, match=f"{SECOND}: b has the dtype F8_E8M0"):
        open_and_check(folder)


def test_a_file_that_changes_meanwhile_is_noticed(folder: Path) -> None:
    reader = CheckpointReader.open(folder)
    save_file({"b": torch.ones(5)}, folder / SECOND)
    with pytest.raises(CheckpointError, match=f"{SECOND}: b changed while it was read"):
        reader.read("b")


def test_json_of_any_size_is_not_read(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"x": "y" * 2**22}))
    with pytest.raises(CheckpointError, match=r"config.json is larger than \d+ bytes"):
        SafeFolder.of(folder).json("config.json")


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    open_and_check(snapshot)
    (blobs / SECOND).rename(tmp_path / "hub" / "elsewhere")
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match="leads out"):
        open_and_check(snapshot)


def test_links_inside_the_folder_are_followed(folder: Path) -> None:
    (folder / SECOND).rename(folder / "other.safetensors")
    (folder / SECOND).symlink_to("other.safetensors")
    open_and_check(folder)


def test_the_pickle_would_have_run(folder: Path) -> None:
    pickle_only(folder)
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "pytorch_model.bin"], env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 3
