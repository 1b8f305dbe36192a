"""prepack_weights: wide linear layers of chosen groups read weights in oneDNN's layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.passes.choose_form import Setting
from fxfusion.passes.prepack_weights import PrepackWeights
from fxfusion.pipeline import Fused, fuse_captured
from fxfusion.policy import FusionPolicy
from tests.helpers import Plain, assert_exact, capture, parallel_form, stack, tokens

PACKED = torch.ops.fxfusion.packed_linear.default


def fused(model: nn.Module, x: torch.Tensor, form: str, policy: FusionPolicy | None = None) -> Fused:
    setting = Setting(request=form)  # type: ignore[arg-type]
    return fuse_captured(capture(model, x), policy or FusionPolicy(), verify="numeric", compiled_for=setting)


def targets(found: Fused) -> list[object]:
    return [node.target for node in found.module.graph.nodes if node.target in (F.linear, PACKED)]


@pytest.mark.parametrize("make", [stack, lambda: stack(Plain, nn.LayerNorm)], ids=["gated", "plain with biases"])
def test_every_wide_linear_layer_is_packed_and_right(make: object) -> None:
    model, x = make().float(), tokens().float()  # type: ignore[operator]
    captured = capture(model, x)
    found = fused(model, x, "prepacked")
    assert set(targets(found)) == {PACKED} and len(found.packs) == 1
    assert "pack_weight" in found.packs[0].module.code
    packed = found.packs[0].module(*[captured.values[name] for name in found.packs[0].sources])
    result = found.module(*captured.inputs, *packed)[0]
    assert_exact(result, parallel_form(model, x), torch.float32)
    with torch.no_grad():
        next(model.layers[1].ffn.parameters())[0, 0] += 1.0
    with pytest.raises(AssertionError):
        assert_exact(result, parallel_form(model, x), torch.float32)


@pytest.mark.parametrize("form", ["concatenated", "members"])
def test_other_forms_are_left_alone(form: str) -> None:
    found = fused(stack().float(), tokens().float(), form)
    assert set(targets(found)) == {F.linear}
    assert len(found.packs) == (form == "concatenated")


def test_a_second_run_changes_nothing() -> None:
    captured = capture(stack().float(), tokens().float())
    found = fused(stack().float(), tokens().float(), "prepacked")
    history = History(check=True)
    run_passes(found.module, [PrepackWeights([])], history)
    run_passes(captured.module, [PrepackWeights([])], history)
    assert [record.changed for record in history.records] == [0, 0]


def test_the_proof_covers_the_packed_layers() -> None:
    (proof,) = fused(stack().float(), tokens().float(), "prepacked").report.verifications
    assert proof["passed"] and proof["dtype"] == "float32"
    assert fused(stack().float(), tokens().float(), "members").report.verifications == ()
