"""prepack_weights: wide linear layers of chosen groups read weights in oneDNN's layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfusion.compiler.pipeline import Fused, fuse_captured
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.passes import choose_form
from fxfusion.passes.choose_form import Setting
from fxfusion.passes.prepack_weights import PrepackWeights
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import Gated, Plain, Rms, assert_exact, capture, error_of, parallel_form, stack, tokens
from tests.passes.output_norms import post_parallel, post_stack

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


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("ffn", [Gated, Plain], ids=["gated", "plain with biases"])
def test_members_with_norms_on_their_outputs(
    ffn: type[nn.Module], in_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own down projections are packed too, unless they are float32 and in cache."""
    if not in_cache:
        monkeypatch.setattr(choose_form, "CACHE", 0)
    model, x = post_stack(norm=Rms, ffn=ffn, widths=(12, 4, 20)).float(), tokens().float()
    captured = capture(model, x)
    found = fused(model, x, "prepacked")
    downs = [F.linear if in_cache else PACKED] * 3
    assert targets(found) == [PACKED] * (2 if ffn is Gated else 1) + downs and len(found.packs) == 1
    packed = found.packs[0].module(*[captured.values[name] for name in found.packs[0].sources])
    result = found.module(*captured.inputs, *packed)[0]
    assert_exact(result, post_parallel(model, x), torch.float32)
    (group,) = found.report.groups
    left = ("down", "fc2") if in_cache else ()
    matrices = [name for name, value in model.named_parameters() if value.dim() == 2]
    weights = sum(model.get_parameter(name).numel() for name in matrices if not any(part in name for part in left))
    assert (group.form, group.packed_bytes) == ("grouped_prepacked", 4 * weights)
    with torch.no_grad():
        model.layers[1].output.weight[0] += 1.0
    with pytest.raises(AssertionError):
        assert_exact(result, post_parallel(model, x), torch.float32)


def test_members_with_norms_on_their_outputs_one_by_one() -> None:
    """In parallel form on their own weights: nothing is packed."""
    model, x = post_stack(norm=Rms).float(), tokens().float()
    captured = capture(model, x)
    found = fused(model, x, "members")
    assert targets(found) == [F.linear] * 9 and not found.packs and found.report.groups[0].packed_bytes == 0
    assert_exact(found.module(*captured.inputs)[0], post_parallel(model, x), torch.float32)
    assert error_of(model(x), post_parallel(model, x)) > 1e-3


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
    proof, *_ = fused(stack().float(), tokens().float(), "prepacked").report.verifications
    assert proof["passed"] and proof["dtype"] == "float32"
    by_members = fused(stack().float(), tokens().float(), "members").report.verifications
    assert [row["part"] for row in by_members] == ["group 0", "whole graph", "clean-up"]
