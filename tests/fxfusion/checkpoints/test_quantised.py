"""Quantised folders: what is in them, that plain transformers loads them, and what is refused before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fxfusion
from fxfusion.checkpoints import quantised
from fxfusion.checkpoints.quantised import linear_layers
from fxfusion.errors import CheckpointError, OptionError
from fxfusion.models.weight_grid import WeightGrid
from tests.fxfusion.recovery.own_text import PLAN, model_of, own_text

FORMATS: list[Literal["nemotron-nas", "transformers"]] = ["nemotron-nas", "transformers"]
WIDE = "layers.1.mlp.down_proj"  # in memory, and in a folder
PLACES = {"nemotron-nas": WIDE, "transformers": "layers.0.further.0.mlp.down_proj"}
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")

CHILD = """
import json, sys
sys.modules["fxfusion"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2])), use_cache=False).logits
print(json.dumps([type(model.model.layers[0].mlp.down_proj.weight).__name__, logits.tolist()]))
"""


def fused(dtype: torch.dtype = torch.float32) -> Any:
    return fxfusion.fuse(model_of().to(dtype), PLAN)


@torch.no_grad()
def rounded(model: Any, grid: str) -> Any:
    for one in linear_layers(model).values():
        one.weight.copy_(WeightGrid.parse(grid).nearest(one.weight))
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("quantize", "dtype"), [("int4", torch.float32), ("int8", torch.bfloat16), ("int4", torch.float16)]
)
def test_what_is_in_the_folder(format: Any, quantize: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, out = fused(dtype), tmp_path / "out"
    before = {name: value.clone() for name, value in model.named_parameters()}
    fxfusion.save_pretrained(model, out, format, quantize=quantize, group_size=16, max_shard_size="20KB")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters()), "the model was changed"
    assert not (out / "fxfusion_residue.st").exists() and not (out / "before").exists()
    found, grid = stored(out), WeightGrid.parse(f"{quantize}:16")
    for own, place in (("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"), (WIDE, PLACES[format])):
        weight, name = model.get_parameter(f"model.{own}.weight"), f"model.{place}._weight"
        integers, scales = grid.quantised(weight)  # the nemotron-nas layout pads FFNs with zeros
        assert torch.equal(found[f"{name}_qdata"][:, : weight.shape[1]], integers)
        assert torch.equal(found[f"{name}_scale"][:, : scales.shape[1]].float(), scales)
        assert not found[f"{name}_zero_point"].any() and f"model.{place}.weight" not in found
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    config = json.loads((out / "config.json").read_text("utf-8"))["quantization_config"]
    assert config["quant_method"] == "torchao" and "16" in json.dumps(config["quant_type"])
    assert f"{grid.bits}-bit integers, in groups of 16" in (out / "README.md").read_text("utf-8")
    with pytest.raises(CheckpointError, match="quantis|loaded by its own code"):
        fxfusion.from_pretrained(out)


@pytest.mark.slow  # a process of its own
@pytest.mark.parametrize("format", FORMATS)
def test_plain_transformers_loads_it(format: Any, tmp_path: Path) -> None:
    fxfusion.save_pretrained(fused(), tmp_path / "out", format, quantize="int4", group_size=16)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    tokens = own_text()[0][:2]
    command = [sys.executable, "-c", CHILD, str(tmp_path / "out"), json.dumps(tokens.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    kind, found = json.loads(done.stdout.splitlines()[-1])
    assert kind == "IntxUnpackedToInt8Tensor"
    wanted, other = (model(tokens, use_cache=False).logits for model in (rounded(fused(), "int4:16"), fused()))
    size = wanted.norm()
    assert (torch.tensor(found) - wanted).norm() < 1e-5 * size < 1e-2 * size < (torch.tensor(found) - other).norm()


@pytest.mark.slow
def test_a_model_on_the_grid_is_exported_as_it_is(tmp_path: Path) -> None:
    """From memory, and by way of a canonical folder."""
    model = fxfusion.refit(model_of(), PLAN, own_text(), grid="int4:16")
    before = {name: one.weight.detach().clone() for name, one in linear_layers(model).items()}
    fxfusion.save_pretrained(model, tmp_path / "canonical")
    again = fxfusion.from_pretrained(tmp_path / "canonical")
    for number, one in enumerate((model, again)):
        fxfusion.save_pretrained(one, tmp_path / f"out{number}", "transformers", quantize="int4", group_size=16)
        found = stored(tmp_path / f"out{number}")
        for name, weight in before.items():
            place = name.replace("layers.1", "layers.0.further.0").replace("layers.2", "layers.1")
            integers, scales = found[f"{place}._weight_qdata"], found[f"{place}._weight_scale"]
            assert torch.equal(integers * scales.repeat_interleave(16, 1), weight), name
    other = fxfusion.refit(model_of(), PLAN, own_text())
    fxfusion.save_pretrained(other, tmp_path / "other", "transformers", quantize="int4", group_size=16)
    found, name = stored(tmp_path / "other"), f"model.{PLACES['transformers']}._weight"
    values = found[f"{name}_qdata"] * found[f"{name}_scale"].repeat_interleave(16, 1)
    assert not torch.equal(values, linear_layers(other)[f"model.{WIDE}"].weight)


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_that_is_not_what_it_should_be(format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = quantised._values

    def off(*given: Any) -> Any:
        for name, value in kept(*given):
            yield name, value + (name == "model.layers.0.self_attn.q_proj._weight_zero_point")

    monkeypatch.setattr(quantised, "_values", off)
    with pytest.raises(CheckpointError, match="layers.0.self_attn.q_proj.weight, loaded by transformers, is not what"):
        fxfusion.save_pretrained(fused(), tmp_path / "out", format, quantize="int8", group_size=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (dict(quantize="int3"), OptionError, "quantize: expected one of int4, int8, got 'int3'"),
        (dict(group_size=32), OptionError, "group_size is of quantize"),
        (dict(quantize="int4", group_size=24), OptionError, "q_proj has 32 inputs, which are no whole groups of 24"),
        (dict(quantize="int4", group_size=0), OptionError, "group_size: expected int4:GROUP"),
        (dict(quantize="int4", format="canonical"), OptionError, "not of format canonical .it keeps the original"),
        (dict(quantize="int4", format="gguf"), OptionError, "not of format gguf .*gguf_type q8_0 and q4_0"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_what_cannot_be(more: Any, error: Any, message: str, format: Any, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        fxfusion.save_pretrained(fused(), tmp_path / "out", **{"format": format, **more})
    assert not any(tmp_path.iterdir())


def test_weights_that_are_no_floating_point_numbers(tmp_path: Path) -> None:
    model = fused()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    names = {"model.layers.0.mlp.up_proj.weight"}
    model.save_pretrained(tmp_path / "plain")
    reader = quantised.CheckpointReader.open(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="up_proj.weight: not all values are finite, so it cannot be quantised"):
        list(quantised._values(reader, names, WeightGrid(4, 16)))
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(64, 32).char(), requires_grad=False)
    with pytest.raises(OptionError, match="up_proj is torch.int8, and only floating-point weights are rounded"):
        quantised.check_layers(model, WeightGrid(4, 16))
    with pytest.raises(CheckpointError, match="no nn.Linear in its layers"):
        quantised.check_layers(
            torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Tanh()])}), WeightGrid(4, 16)
        )


def test_torchao_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"torchao, which is not installed: pip install 'fxfusion\[quant\]'"):
        quantised.grid_of("int4", None, "transformers")
