from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfusion.analysis.resume import (
    check_batches,
    check_facts,
    model_key,
    read_json,
    remove_others,
    write_json,
    write_tensors,
)
from fxfusion.errors import OptionError
from fxfusion.files import RECORD
from fxfusion.models.traced import TracedModel


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


def test_equal_models_have_equal_keys() -> None:
    assert key(Model()) == key(Model()) == key(Model().eval())


@pytest.mark.parametrize("change", ["one weight", "buffer", "complex", "dtype", "shape", "name", "class", "dropped"])
def test_the_key_changes_with_the_model(change: str) -> None:
    model, dropped = Model(), ()
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


def test_half_precision_and_fp8_weights_have_keys() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        layer = nn.Linear(3, 4, dtype=torch.float32)
        layer.weight.data = layer.weight.data.to(dtype)
        assert len(key(layer)) == 16


def test_batches_are_compared_as_far_as_both_go() -> None:
    check_batches(["a", "b"], ["a", "b"], "file")
    check_batches(["a"], ["a", "b"], "file")
    check_batches(["a", "b"], ["a"], "file")
    with pytest.raises(OptionError, match="file holds measurements on other text: batch 1 differs"):
        check_batches(["a", "b"], ["a", "c", "d"], "file")


def test_facts_that_differ_are_named() -> None:
    check_facts({"unit": "ffn", "more": 1}, {"unit": "ffn"}, "file")
    with pytest.raises(OptionError, match=r"file holds another measurement \(unit is block, here it is ffn\)"):
        check_facts({"unit": "block", "model": 1}, {"unit": "ffn", "model": 1}, "file")
    with pytest.raises(OptionError, match="unit is None, here it is ffn"):
        check_facts([], {"unit": "ffn"}, "file")


def test_json_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    assert read_json(path, "a cache") is None
    data = {"numbers": [0.1, 1e-300, 3.0000000000000004]}
    write_json(path, data)
    assert read_json(path, "a cache") == data == json.loads(path.read_text())
    with pytest.raises(ValueError):
        write_json(path, {"bad": math.nan})
    assert read_json(path, "a cache") == data
    assert sorted(found.name for found in path.parent.iterdir()) == [RECORD, "file.json"]


@pytest.mark.parametrize(("content", "message"), [(b"{", "cannot be read as"), (b"\xff", "cannot be"), (b"3", "a int")])
def test_what_is_no_json_object_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_json(tmp_path / "file", "a cache")


def test_only_our_own_earlier_files_are_removed(tmp_path: Path) -> None:
    for name in ("sums_1.safetensors", "sums_2.safetensors"):
        write_tensors(tmp_path / name, {"a": torch.ones(1)})
    (tmp_path / "sums_mine.safetensors").write_text("mine")
    remove_others("sums_*.safetensors", tmp_path / "sums_2.safetensors")
    assert sorted(path.name for path in tmp_path.glob("sums_*")) == ["sums_2.safetensors", "sums_mine.safetensors"]


def test_tensors_are_written_from_any_layout(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    value = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "file", {"turned": value.T, "part": value[:, 1]})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["turned"], value.T) and torch.equal(found["part"], value[:, 1])
