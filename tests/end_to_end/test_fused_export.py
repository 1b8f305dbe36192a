"""A fused model leaves Python: `torch.export` in both modes, and an AOTInductor package no larger than needed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from tests.end_to_end import caching
from tests.end_to_end.caching import RED, off
from tests.end_to_end.family_table import family_named

pytestmark = pytest.mark.slow

LIMIT = 1e-5
OVERHEAD = 5 * 10**6  # bytes that a package may have beside the weights
MEMBERS = [1, 2, 3]
LENGTHS = {"input_ids": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("tokens", min=2, max=64)}}


class Logits(nn.Module):
    """What a server needs of a causal language model: token ids `[batch, tokens]` in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Without attention in three layers: as it is, and fused. Tied embeddings of 6 MB, 2.6 MB of other weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 12_000, "tie_word_embeddings": True}
    model = caching.decoder(family_named("llama"), **sizes)
    fxfusion.drop_attention(model, MEMBERS)
    unfused = copy.deepcopy(model)
    fxfusion.fuse(model, fxfusion.FusionPlan(dropped_attention=MEMBERS, groups=[MEMBERS]))
    return Logits(unfused).eval(), Logits(model).eval()


def bytes_of(model: nn.Module) -> int:
    """Of the weights, tied ones once."""
    return sum(value.numel() * value.element_size() for value in model.parameters())


@torch.no_grad()
def compare(exported: Any, models: tuple[nn.Module, nn.Module]) -> None:
    """For sizes other than the example's too; the model that is not fused is another one."""
    unfused, fused = models
    for batch, length in ((2, 12), (1, 5), (3, 40)):
        ids = caching.token_ids(batch, length)
        found = exported(ids)
        assert off(found, fused(ids)) <= LIMIT
        assert off(found, unfused(ids)) > RED


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_computes_the_same_and_holds_each_weight_once(
    strict: bool, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    program = torch.export.export(models[1], (caching.token_ids(),), dynamic_shapes=LENGTHS, strict=strict)
    wide = [name for name, value in program.state_dict.items() if 3 * 384 in value.shape]
    assert [name.rpartition("mlp.")[2] for name in wide] == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    torch.export.save(program, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size <= bytes_of(models[1]) + OVERHEAD
    compare(torch.export.load(tmp_path / "model.pt2").module(), models)


@pytest.mark.compile
def test_an_aotinductor_package_computes_the_same_and_is_no_larger_than_the_weights_plus_5_mb(
    models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    with torch.no_grad():
        program = torch.export.export(models[1], (caching.token_ids(),), dynamic_shapes=LENGTHS)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    size, weights = Path(package).stat().st_size, bytes_of(models[1])
    print(f"package: {size} bytes, weights: {weights}, beside them: {size - weights}")
    assert weights < size <= weights + OVERHEAD
    compare(torch._inductor.aoti_load_package(package), models)
