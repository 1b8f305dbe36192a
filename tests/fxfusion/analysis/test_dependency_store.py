from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.analysis.dependency_store import MatrixState
from fxfusion.errors import OptionError
from fxfusion.files import RECORD

FACTS = {"unit": "ffn", "model": "abc"}


def matrix(count: int = 3) -> DependencyMatrix:
    generator = torch.Generator().manual_seed(0)
    return DependencyMatrix(
        values=torch.rand(count, count, generator=generator).triu(1),
        cosine=torch.rand(count, generator=generator),
        ratio=torch.rand(count, generator=generator),
        contribution_cosine=torch.rand(count, generator=generator),
        layers=tuple(range(2, 2 + count)),
        names=tuple(f"layers.{layer}" for layer in range(2, 2 + count)),
        unit="block",
        attention=(2,),
        dropped_attention=(3, 4),
        tokens=70,
        sequences=7,
    )


def sums(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(2, 2, generator=generator, dtype=torch.float64) / 3 for name in ("values", "ratio")}


def state(folder: Path | None, batches: list[str], **changes: Any) -> MatrixState:
    return MatrixState.open(folder, lambda: FACTS | changes, batches)


# --- a finished matrix --------------------------------------------------------------------------------


def test_a_saved_matrix_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    saved = matrix()
    saved.save(tmp_path / "new" / "folder")
    loaded = DependencyMatrix.load(tmp_path / "new" / "folder")
    assert loaded.to_dict() == saved.to_dict()
    assert torch.equal(loaded.values, saved.values) and loaded.layers == (2, 3, 4) and loaded.unit == "block"
    assert loaded.names == saved.names and loaded.attention == (2,) and loaded.dropped_attention == (3, 4)
    assert json.loads(json.dumps(loaded.to_dict()))["values"][0][1] == float(saved.values[0, 1])


def test_a_matrix_may_take_the_place_of_another(tmp_path: Path) -> None:
    matrix(3).save(tmp_path)
    matrix(5).save(tmp_path)
    assert DependencyMatrix.load(tmp_path).layers == (2, 3, 4, 5, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "matrix.json", "matrix.safetensors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "matrix.json").unlink(), "no dependency matrix in .*matrix.json is missing"),
        (lambda folder: (folder / "matrix.safetensors").unlink(), "matrix.safetensors is missing"),
        (lambda folder: matrix(4).save(folder / "b") or swap(folder), "does not belong to the JSON file beside it"),
        (lambda folder: (folder / "matrix.json").write_text("{"), "cannot be read as a dependency matrix"),
        (lambda folder: edit(folder, format=9), "format is 9, here it is 1"),
        (lambda folder: edit(folder, extra=1), "holds no dependency matrix: its fields are"),
    ],
    ids=["no json", "no tensors", "other tensors", "broken json", "other format", "other fields"],
)
def test_a_damaged_matrix_is_an_error(damage: Any, message: str, tmp_path: Path) -> None:
    matrix().save(tmp_path)
    DependencyMatrix.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(OptionError, match=message):
        DependencyMatrix.load(tmp_path)


def swap(folder: Path) -> None:
    (folder / "b" / "matrix.safetensors").replace(folder / "matrix.safetensors")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "matrix.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_full_disk_leaves_the_old_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = matrix(3)
    old.save(tmp_path)

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OptionError, match="cannot be written .nothing was changed.: No space left"):
            matrix(4).save(tmp_path)
    assert DependencyMatrix.load(tmp_path).to_dict() == old.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "matrix.json", "matrix.safetensors"]


# --- the state of a measurement -----------------------------------------------------------------------


def test_sums_are_added_and_found_again(tmp_path: Path) -> None:
    first = state(tmp_path, ["a", "b", "c"])
    assert first.done == 0 and first.sums == {}
    first.add("a", sums(1))
    first.add("b", sums(2))
    second = state(tmp_path, ["a", "b", "c"])
    assert second.done == 2
    assert all(torch.equal(second.sums[name], sums(1)[name] + sums(2)[name]) for name in ("values", "ratio"))
    second.add("c", sums(3))
    expected = sums(1)["values"] + sums(2)["values"] + sums(3)["values"]
    assert torch.equal(state(tmp_path, ["a", "b", "c"]).sums["values"], expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "state.json", "sums_000003.safetensors"]


def test_without_a_folder_nothing_is_written_and_no_digest_made(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def never() -> dict[str, Any]:
        raise AssertionError("the digest of the model costs a pass over its weights")

    found = MatrixState.open(None, never, ["a"])
    found.add("a", sums(1))
    assert found.done == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["tensors", "json"])
def test_a_process_killed_while_writing_leaves_the_state_before(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = state(tmp_path, ["a", "b"])
    found.add("a", sums(1))

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"fxfusion.analysis.dependency_store.write_{moment}", killed)
        with pytest.raises(KeyboardInterrupt):
            found.add("b", sums(2))
    again = state(tmp_path, ["a", "b"])
    assert again.done == 1 and torch.equal(again.sums["values"], sums(1)["values"])
    again.add("b", sums(2))
    assert state(tmp_path, ["a", "b"]).done == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "sums_000001.safetensors").unlink(), "sums_000001.safetensors is missing"),
        (lambda path: save_file({"values": torch.zeros(2)}, path / "sums_000001.safetensors"), "does not belong"),
        (lambda path: (path / "state.json").write_text("[]"), "holds a list"),
        (lambda path: write_state(path, batches=3), "batches is no list of digests"),
        (lambda path: write_state(path, batches=["z"]), "batch 0 differs"),
        (lambda path: write_state(path, batches=["a"] * 3), "sums over 3 batches, more than the 1 given"),
        (lambda path: write_state(path, model="other"), "model is other, here it is abc"),
    ],
)
def test_a_state_of_something_else_is_an_error(damage: Any, message: str, tmp_path: Path) -> None:
    state(tmp_path, ["a"]).add("a", sums(1))
    assert state(tmp_path, ["a"]).done == 1
    damage(tmp_path)
    with pytest.raises(OptionError, match=message):
        state(tmp_path, ["a"])


def write_state(folder: Path, **changes: Any) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="resume must name a folder"):
        state(tmp_path / "file", ["a"])


def test_the_sums_on_disk_are_float64(tmp_path: Path) -> None:
    state(tmp_path, ["a"]).add("a", sums(1))
    stored = load_file(tmp_path / "sums_000001.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float64}
