"""Quantising a fused model, and fusing a quantised one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup, PerTensor

import fxfusion
from bench.reference import heldout_batches, load_model
from fxfusion.errors import SurgeryError
from tests.end_to_end.eager_parallel import (
    llama,
    parallel_logits,
    phi3,
    randomised,
    relative,
    token_ids,
    with_widths,
)

LIMIT, RED = 1e-5, 1e-3
DROPPED, GROUP = [1, 2], [0, 1, 2]

INT8 = Int8WeightOnlyConfig()
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
JOINABLE = {
    "int8": INT8,
    "int4 in groups of 32": INT4,
    "int8 in groups of 16": Int8WeightOnlyConfig(granularity=PerGroup(16)),
    "int8, one scale": Int8WeightOnlyConfig(granularity=PerTensor()),
    "intx, 8 bits": IntxWeightOnlyConfig(weight_dtype=torch.int8),
}


def plan(norm: Literal["fold", "last"] = "last") -> fxfusion.FusionPlan:
    return fxfusion.FusionPlan(dropped_attention=DROPPED, groups=[GROUP], norm=norm)


def quantised(model: Any, config: Any = INT8) -> Any:
    quantize_(model, config)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return found


def dequantised(model: Any) -> Any:
    """A copy that holds the numbers which the quantised weights stand for."""
    found = copy.deepcopy(model)
    for module in found.modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "qdata"):
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return found


# --- quantising a fused model -------------------------------------------------------------------------


@pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
def test_a_fused_model_is_quantised_like_any_other(config: Any) -> None:
    fused = fxfusion.fuse(llama(), plan("fold"))
    before = {name: value.clone() for name, value in fused.named_parameters()}
    wanted = logits(fused)
    quantised(fused, config)
    wide = fused.model.layers[0].mlp.down_proj
    assert type(wide) is nn.Linear and wide.weight.shape == (32, 192) and wide.weight.qdata.dtype == torch.int8
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = fused.model.layers[0].mlp.get_submodule(name).weight
        step = weight.scale.repeat_interleave(weight.shape[1] // weight.scale.shape[1], 1)
        off = (weight.dequantize() - before[f"model.layers.0.mlp.{name}.weight"]).abs()
        assert (off <= 1.01 * step).all() and off.max() > 0.1 * step.max(), "each weight is off by a step at most"
    assert relative(logits(fused), logits(dequantised(fused))) <= LIMIT
    assert relative(logits(fused), wanted) > RED


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, most, top1",
    [(INT8, 1e-3, 0.98), (INT4, 0.03, 0.85), (PrototypeInt4WeightOnlyConfig(group_size=32), 0.02, 0.88)],
    ids=["int8", "int4", "int4 with a kernel for CPUs"],
)
def test_quality_of_the_reference_model_fused_and_quantised(config: Any, most: float, top1: float) -> None:
    fused = fxfusion.fuse(load_model(torch.bfloat16), {"dropped_attention": [6, 7, 8], "groups": [[5, 6, 7, 8]]})
    found = fxfusion.evaluate(
        quantised(copy.deepcopy(fused), config), heldout_batches(batch=4, limit=2), reference=fused, resamples=200
    )
    assert found.kl is not None and found.top1 is not None
    assert 1e-6 < found.kl.value < most and top1 < found.top1.value < 1


# --- fusing a quantised model -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [*(pytest.param(JOINABLE[name], id=name) for name in list(JOINABLE)[:2])]
    + [pytest.param(JOINABLE[name], id=name, marks=pytest.mark.slow) for name in list(JOINABLE)[2:]],
)
def test_quantised_members_are_joined_bit_for_bit(config: Any) -> None:
    model = quantised(llama(), config)
    before = {name: value.dequantize() for name, value in model.named_parameters() if hasattr(value, "qdata")}
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids(), "last")
    unlike = quantised(with_widths(llama(), [64] * 4, seed=9), config)
    fxfusion.fuse(model, plan())
    wide = model.model.layers[0].mlp
    assert type(wide.gate_proj) is nn.Linear and type(wide.gate_proj.weight) is type(unlike.lm_head.weight)
    rows = [before[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in GROUP]
    columns = [before[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in GROUP]
    assert torch.equal(wide.up_proj.weight.dequantize(), torch.cat(rows))
    assert torch.equal(wide.down_proj.weight.dequantize(), torch.cat(columns, 1))
    assert relative(logits(model), wanted) <= LIMIT
    assert relative(logits(model), parallel_logits(unlike, DROPPED, [GROUP], token_ids(), "last")) > RED
    fxfusion.unfuse(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name].dequantize(), value) for name, value in before.items() if "mlp" in name)


@pytest.mark.slow
@pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
def test_half_precision(config: Any) -> None:
    model = quantised(llama().bfloat16(), config)
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids(), "last")
    truth = parallel_logits(dequantised(model).float(), DROPPED, [GROUP], token_ids(), "last")
    fxfusion.fuse(model, plan())
    assert relative(logits(model), truth) <= 2 * relative(wanted, truth)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: with_widths(llama(), [64, 96, 32, 64]), phi3], ids=["widths", "packed"])
@pytest.mark.parametrize("shards", [1, 2])
def test_unequal_widths_packed_projections_and_shards(make: Callable[[], Any], shards: int) -> None:
    model = quantised(make(), INT8)
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids(), "last")
    fxfusion.fuse(model, plan(), shards=shards)
    assert relative(logits(model), wanted) <= LIMIT


@pytest.mark.slow
def test_an_adapter_on_quantised_members_is_carried() -> None:
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model = randomised(peft.get_peft_model(quantised(llama(), INT4), config), seed=5, only="lora_")
    wanted = parallel_logits(model, DROPPED, [GROUP], token_ids(), "last")
    with model.disable_adapter():
        without = logits(model)
    fxfusion.fuse(model, plan())
    assert relative(logits(model), wanted) <= LIMIT < RED < relative(logits(model), without)


class PackedParameter(nn.Parameter):
    """Weights in a layout of its own, as a parameter class."""


class ForeignLinear(nn.Module):
    """A linear layer whose weight is such a parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = PackedParameter(linear.weight.data, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class DequantisingLinear(nn.Module):
    """A linear layer that keeps integers and scales in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("integers", (linear.weight.data / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.integers.to(x.dtype) * self.scale)


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Any:
    model = llama()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer.mlp.set_submodule(name, make(layer.mlp.get_submodule(name)))
    return model


def partly(config: Any) -> Any:
    model = llama()
    quantize_(model, config, filter_fn=lambda module, name: name == "model.layers.1.mlp.up_proj")
    return model


FIRST = "fuse first, then quantise"
REFUSED: dict[str, tuple[Callable[[], Any], Literal["fold", "last"], str]] = {
    "fold": (lambda: quantised(llama()), "fold", r"layers.0.mlp.gate_proj.weight is quantised, so the norm's gain"),
    "activations too": (
        lambda: quantised(llama(), Int8DynamicActivationInt8WeightConfig()),
        "last",
        r"model.layers.\d.*Int8Tensor",
    ),
    "packed": (
        lambda: quantised(llama().bfloat16(), PrototypeInt4WeightOnlyConfig(group_size=32)),
        "last",
        r"model.layers.\d.*Int4OpaqueTensor",
    ),
    "only one": (lambda: partly(INT8), "last", r"layers.1.mlp.up_proj.weight, .* are quantised in different ways"),
    "narrow": (
        lambda: quantised(with_widths(llama(), [64, 72, 64, 64])),
        "last",
        r"layers.0.mlp.down_proj.weight: the members' scales fit together only in blocks of 8",
    ),
    "a parameter class": (lambda: replaced(ForeignLinear), "last", r"model.layers.\d.*PackedParameter"),
    "modules": (lambda: replaced(DequantisingLinear), "last", r"model.layers.\d.mlp: .* is computed, not a parameter"),
}


@pytest.mark.parametrize(
    "make, norm, message",
    [
        pytest.param(*case, id=name, marks=() if name in ("fold", "packed") else pytest.mark.slow)
        for name, case in REFUSED.items()
    ],
)
def test_what_cannot_be_joined_is_refused(make: Callable[[], Any], norm: Literal["fold", "last"], message: str) -> None:
    model = make()
    before, names = logits(model), list(model.state_dict())
    with pytest.raises(SurgeryError, match=rf"{message}.*{FIRST}"):
        fxfusion.fuse(model, plan(norm))
    assert torch.equal(logits(model), before) and list(model.state_dict()) == names


class MixesTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_a_model_that_says_it_is_quantised_and_has_no_ffn_to_be_read_is_refused() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = MixesTokens()
    model.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(SurgeryError, match=f"LlamaForCausalLM is quantised, .*{FIRST}"):
        fxfusion.fuse(model, plan())
