"""What stops goes on: results are found again, whole, and only for the same model and text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxfusion.analysis import store as module
from fxfusion.analysis.batches import text_key
from fxfusion.analysis.dependency import DependencyMatrix, MatrixState
from fxfusion.analysis.intervals import Estimate
from fxfusion.analysis.meter import Qualities
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.score_runs import Address, ScoreCache
from fxfusion.analysis.store import MEASURED, Store, check_batches, model_key
from fxfusion.errors import OptionError
from fxfusion.files import RECORD, replacing
from fxfusion.models.traced import TracedModel


def opened(path: Path | None, **facts: Any) -> Store:
    return Store(path, "a thing", lambda: {"model": "m", **facts})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def never() -> Any:
    raise AssertionError("the digest of the model costs a pass over its weights")


# --- values and tensors -------------------------------------------------------------------------------


def test_values_and_tensors_are_found_again(tmp_path: Path) -> None:
    path, value = tmp_path / "deep" / "it.json", torch.arange(6.0).reshape(2, 3)
    first = opened(path)
    assert first.data == {} and not path.parent.exists()
    for step in (1.0, 2.0):
        first.data = {"numbers": [0.1, 1e-300], "kept": first.keep({"turned": step * value.T, "part": value[:, 1]})}
        first.save()
    again = opened(path)
    assert again.data == first.data
    found = again.tensors(again.data["kept"], like={"part": value[:, 1]})
    assert torch.equal(found["turned"], 2 * value.T) and torch.equal(found["part"], value[:, 1])
    assert names(path.parent) == sorted([RECORD, "it.json", again.data["kept"]["file"]]), "the first tensors are gone"
    again.data["numbers"] = [math.nan]
    with pytest.raises(ValueError):
        again.save()
    assert opened(path).data["numbers"] == [0.1, 1e-300]


def test_files_of_others_stay(tmp_path: Path) -> None:
    """What only looks like ours, and what another store beside it keeps."""
    other = opened(tmp_path / "it_2.json")
    other.data = other.keep({"a": torch.ones(1)})
    other.save()
    mine = tmp_path / "it_0123456789ab.safetensors"
    mine.write_text("mine")
    one = opened(tmp_path / "it.json")
    for number in range(2):
        one.data = one.keep({"a": torch.tensor(number)})
        one.save()
    assert mine.exists() and other.tensors(other.data)["a"] == 1 and len(names(tmp_path)) == 6


def test_without_a_path_nothing_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(None, "a thing", never) as found:
        assert found.keep({"a": torch.ones(1)}) == {}
        found.data["a"] = 1
        found.changed()
    cache = ScoreCache(None, never, ["a"])
    cache.put(("loss", (5, 2), None), 0, [1.0])
    assert cache.get(("loss", (2, 5), None), 0) == [1.0], "the order of dropping does not matter"
    state = MatrixState(None, never, ["a"])
    state.add({"values": torch.ones(2)})
    assert state.done == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["keep", "save"])
def test_a_process_killed_while_writing_leaves_what_was_before(moment: str, tmp_path: Path) -> None:
    found = MatrixState(tmp_path, dict, ["a", "b"])
    found.add({"values": torch.ones(2)})

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, moment, killed)
        found.add({"values": torch.ones(2)})
    again = MatrixState(tmp_path, dict, ["a", "b"])
    assert again.done == 1 and torch.equal(again.sums["values"], torch.ones(2))
    again.add({"values": torch.ones(2)})
    assert MatrixState(tmp_path, dict, ["a", "b"]).done == 2 and len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"{"), "cannot be read as a thing"),
        (lambda path: path.write_bytes(b"\xff"), "cannot be read as a thing"),
        (lambda path: path.write_text("3"), "is not a thing: it holds a int"),
        (lambda path: edit(path, format=9), r"another measurement \(format is 9, here it is 2\)"),
        (lambda path: edit(path, facts={"model": "x", "unit": 1}), r"another measurement \(model is x, here it is m\)"),
        (lambda path: edit(path, facts=[]), "model is None, here it is m"),
        (lambda path: edit(path, kept=3), "it names no file of tensors"),
        (lambda path: next(path.parent.glob("*.safetensors")).unlink(), r"it_\w+.safetensors cannot be read: No such"),
        (lambda path: save_file({"a": torch.ones(1)}, next(path.parent.glob("*.safetensors"))), "does not belong to"),
    ],
)
def test_what_is_something_else_is_an_error(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    first = opened(path)
    first.data["kept"] = first.keep({"a": torch.zeros(1)})
    first.save()
    damage(path)
    with pytest.raises(OptionError, match=message):
        found = opened(path)
        found.tensors(found.data["kept"])


def test_tensors_must_be_those_that_are_wanted(tmp_path: Path) -> None:
    found = opened(tmp_path / "it.json")
    kept = found.keep({"a": torch.zeros(2)})
    for like in ({"b": torch.zeros(2)}, {"a": torch.zeros(3)}):
        with pytest.raises(OptionError, match=r"does not hold [ab] \[\d\].*delete it to start anew"):
            found.tensors(kept, like)
    with pytest.raises(OptionError, match="is a folder: name a file for a thing"):
        opened(tmp_path)


def test_files_of_an_earlier_version_count_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    with replacing(path, MEASURED) as scratch:
        scratch.write_text(json.dumps({"identity": {"model": "m"}, "plans": {"plan": {"loss": 1}}}))
    with pytest.warns(UserWarning, match="plans.json is of another version of fxfusion: it does not count"):
        found = Qualities(path, lambda: {"model": "m"})
    assert found.get("plan") is None and found.of("plan", lambda: ONE) == ONE
    assert Qualities(path, lambda: {"model": "m"}).get("plan") == ONE


@pytest.mark.parametrize(("seconds", "sizes"), [(0.0, [1, 1, 3, 3, 5]), (0.1, [1, 1, 1, 4, 4])])
def test_changes_are_written_once_a_second_or_less_often_if_that_takes_long(
    seconds: float, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 10.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    write = module.replacing

    def slowly(*args: Any) -> Any:
        nonlocal now
        now += seconds
        return write(*args)

    monkeypatch.setattr(module, "replacing", slowly)
    store, found = opened(tmp_path / "it.json"), []
    for number, moment in enumerate((10.0, 10.9, 11.5, 12.4, 12.6), 1):
        now, store.data["count"] = moment, number
        store.changed()
        found.append(json.loads((tmp_path / "it.json").read_text())["count"])
    assert found == sizes


# --- whose results they are ---------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(300, 70, generator=generator))
        self.register_buffer("table", torch.arange(6))
        self.register_buffer("angles", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("nothing", torch.zeros(0))


def key(model: nn.Module, *dropped: int) -> str:
    return model_key(TracedModel(model, dropped))


@pytest.mark.parametrize("change", ["one weight", "buffer", "complex", "dtype", "shape", "name", "class", "dropped"])
def test_the_key_changes_with_the_model(change: str) -> None:
    model, dropped = Model(), ()
    assert key(model) == key(Model()) == key(Model().eval())
    with torch.no_grad():
        if change == "one weight":
            model.weight[123, 45] += 1e-6
        elif change == "buffer":
            model.table[3] = 9
        elif change == "complex":
            model.angles[1] = 1j
        elif change == "dtype":
            model.weight.data = model.weight.data.double()
        elif change == "shape":
            model.weight.data = model.weight.data.reshape(70, 300)
        elif change == "name":
            model.other, model.weight = model.weight, None  # type: ignore[assignment]
        elif change == "class":
            model.__class__ = type("Other", (Model,), {})
        else:
            dropped = (1,)  # type: ignore[assignment]
    assert key(model, *dropped) != key(Model())


def test_half_precision_and_fp8_weights_have_keys_and_missing_ones_none() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        layer = nn.Linear(3, 4, dtype=torch.float32)
        layer.weight.data = layer.weight.data.to(dtype)
        assert len(key(layer)) == 16
    with pytest.raises(OptionError, match="Linear is on the meta device"):
        key(nn.Linear(3, 4, device="meta"))


def test_texts_are_told_apart() -> None:
    ids = torch.arange(8).reshape(2, 4)
    assert text_key([ids]) == text_key([{"input_ids": ids.clone()}]) != text_key([ids, ids])
    assert text_key([ids]) != text_key([ids + 1]) and text_key([ids]) != text_key([ids.T])
    check_batches(["a", "b"], ["a", "b"], "file")
    check_batches(["a"], ["a", "b"], "file")
    check_batches(["a", "b"], ["a"], "file")
    with pytest.raises(OptionError, match="file holds measurements on other text: batch 1 differs"):
        check_batches(["a", "b"], ["a", "c", "d"], "file")


# --- scores -------------------------------------------------------------------------------------------

ADDRESSES: list[Address] = [
    ("loss", (), None),
    ("loss", (3,), None),
    ("kl", (3,), None),
    ("cosine", (), 3),
    ("cosine", (3,), 5),
    ("cosine", (5,), 3),
]


def cached(path: Path | None, batches: list[str] | None = None) -> ScoreCache:
    return ScoreCache(path, lambda: "m", batches if batches is not None else ["a", "b"])


def test_sums_are_found_where_they_were_put_whatever_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with cached(path):
        pass
    assert not path.exists(), "nothing was measured"
    with pytest.raises(KeyboardInterrupt), cached(path) as cache:
        assert isinstance(cache, ScoreCache)
        for number, address in enumerate(ADDRESSES):
            assert cache.get(address, 1) is None
            cache.put(address, 1, [float(number), 0.1])
            assert cache.get(address, 0) is None
        assert cached(path).get(ADDRESSES[0], 1) == [0.0, 0.1], "the first one is written at once"
        raise KeyboardInterrupt
    again = cached(path)
    for number, address in enumerate(ADDRESSES):
        assert again.get(address, 1) == [number, 0.1] and again.get(address, 2) is None


def test_text_may_be_added_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    for batches, put in ((["a", "b", "c"], 2), (["a"], 0), (["a", "b", "c", "d"], 3)):
        with cached(path, batches) as cache:
            assert isinstance(cache, ScoreCache)
            cache.put(ADDRESSES[0], put, [float(put)])
        longest = ["a", "b", "c", "d"] if put == 3 else ["a", "b", "c"]
        assert json.loads(path.read_text())["batches"] == longest
    assert [cached(path, longest).get(ADDRESSES[0], batch) for batch in range(4)] == [[0.0], None, [2.0], [3.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": ["a", "x"]}, "batch 1 differs"),
        ({"values": 3}, "is not a cache of attention scores"),
        ({"values": {"loss": 3}}, "is not a cache of attention scores"),
        ({"batches": None}, "is not a cache of attention scores"),
    ],
    ids=str,
)
def test_a_cache_with_something_else_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    with cached(path) as cache:
        assert isinstance(cache, ScoreCache)
        cache.put(ADDRESSES[0], 0, [1.0])
    edit(path, **changes)
    with pytest.raises(OptionError, match=message):
        cached(path)


# --- qualities ----------------------------------------------------------------------------------------

ONE = Quality(loss=Estimate(1.0, 0.5, 1.5), perplexity=Estimate(2.7, 1.6, 4.5), tokens=7, sequences=2)


def test_qualities_are_measured_once(tmp_path: Path) -> None:
    for path in (tmp_path / "folder" / "plans.json", None):
        found = Qualities(path, lambda: {"model": "a"})
        assert found.get("plan") is None and found.of("plan", lambda: ONE) == ONE == found.of("plan", never)
    again = Qualities(tmp_path / "folder" / "plans.json", lambda: {"model": "a"})
    assert again.of("plan", never) == ONE and again.get("other") is None
    for plans, message in (({"plan": {"loss": 1}}, "plan: .*missing"), ({"plan": 3}, "plan:"), ([], "no object")):
        edit(tmp_path / "folder" / "plans.json", plans=plans)
        with pytest.raises(OptionError, match=f"plans.json is not measured qualities as .*{message}"):
            Qualities(tmp_path / "folder" / "plans.json", lambda: {"model": "a"}).get("plan")


# --- matrices -----------------------------------------------------------------------------------------


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


def test_a_saved_matrix_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    matrix(5).save(tmp_path / "new" / "folder")
    saved = matrix()
    saved.save(tmp_path / "new" / "folder")
    loaded = DependencyMatrix.load(tmp_path / "new" / "folder")
    assert loaded.to_dict() == saved.to_dict() == json.loads(json.dumps(loaded.to_dict()))
    assert torch.equal(loaded.values, saved.values) and loaded.layers == (2, 3, 4) and loaded.unit == "block"
    assert loaded.names == saved.names and loaded.attention == (2,) and loaded.dropped_attention == (3, 4)
    assert len(names(tmp_path / "new" / "folder")) == 3, "another matrix is replaced as a whole"


def test_what_is_no_matrix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no dependency matrix in .*matrix.json is missing"):
        DependencyMatrix.load(tmp_path)
    matrix().save(tmp_path)
    edit(tmp_path / "matrix.json", extra=1)
    with pytest.raises(OptionError, match="holds no dependency matrix: its fields are"):
        DependencyMatrix.load(tmp_path)


def sums(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(2, 2, generator=generator, dtype=torch.float64) / 3 for name in ("values", "ratio")}


def test_sums_are_added_and_found_again(tmp_path: Path) -> None:
    first = MatrixState(tmp_path, dict, ["a", "b", "c"])
    assert first.done == 0 and first.sums == {}
    first.add(sums(1))
    first.add(sums(2))
    second = MatrixState(tmp_path, dict, ["a", "b", "c"])
    assert second.done == 2
    assert all(torch.equal(second.sums[name], sums(1)[name] + sums(2)[name]) for name in ("values", "ratio"))
    second.add(sums(3))
    expected = sums(1)["values"] + sums(2)["values"] + sums(3)["values"]
    assert torch.equal(MatrixState(tmp_path, dict, ["a", "b", "c"]).sums["values"], expected)
    (file,) = tmp_path.glob("*.safetensors")
    assert {value.dtype for value in load_file(file).values()} == {torch.float64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": 3}, "batches is no list of digests"),
        ({"batches": ["z"]}, "batch 0 differs"),
        ({"batches": ["a"] * 3}, "sums over 3 batches, more than the 1 given"),
    ],
)
def test_a_state_of_something_else_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    MatrixState(tmp_path, dict, ["a"]).add(sums(1))
    edit(tmp_path / "state.json", **changes)
    with pytest.raises(OptionError, match=message):
        MatrixState(tmp_path, dict, ["a"])
    with pytest.raises(OptionError, match="resume must name a folder"):
        MatrixState(tmp_path / "state.json", dict, ["a"])
