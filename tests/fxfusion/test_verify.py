"""verify: a right rewrite passes, and every kind of wrong one fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fxfusion
from fxfusion.errors import VerificationError
from fxfusion.graph import ops
from fxfusion.passes.concatenate import GROUP_TAG, Concatenate
from fxfusion.passes.parallelise import Parallelise
from fxfusion.verify import Region, extract_region, verify_group
from tests.helpers import Float32Rms, Gated, History, Plain, Rms, fuse, run_passes, stack, tokens
from tests.passes.test_parallelise import planned


def regions(model: Any) -> tuple[Region, Region, dict[str, torch.Tensor]]:
    """The parallel form, the fused form, and the weights that both read."""
    work, groups = planned(model)
    stream, end = groups[0].members[0].stream, groups[0].members[-1].add
    run_passes(work.module, [Parallelise(groups)], History())
    parallel = extract_region(stream, end)
    run_passes(work.module, [Concatenate(groups)], History())
    total = next(node for node in work.module.graph.nodes if GROUP_TAG in node.meta)
    return parallel, extract_region(stream, total), dict(work.values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_right_rewrite_passes(dtype: torch.dtype) -> None:
    model = stack(Plain, Float32Rms if dtype.itemsize == 2 else nn.LayerNorm, hidden=32, dtype=dtype)
    _, report = fuse(model, tokens(hidden=32, dtype=dtype), verify="numeric")
    (proof,) = report.verifications
    assert proof["passed"] and 0 < proof["error"] <= proof["limit"]
    assert proof["dtype"] == str(dtype).removeprefix("torch.")
    if dtype in (torch.float64, torch.float32):
        assert proof["limit"] == {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]


def linear_of(region: Region, index: int) -> fx.Node:
    return [node for node in region.graph.nodes if ops.op_name(node) == "linear"][index]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_wrong_rewrite_fails(dtype: torch.dtype) -> None:
    model = stack(Gated, Float32Rms if dtype.itemsize == 2 else Rms, dtype=dtype)
    parallel, fused, weights = regions(model)
    assert verify_group(0, parallel, fused, weights).passed
    down = linear_of(fused, -1)
    with fused.graph.inserting_before(down):
        down.args = (fused.graph.call_function(torch.mul, (down.args[0], 1.05)), *down.args[1:])
    with pytest.raises(VerificationError, match="group 0: the fused FFN differs"):
        verify_group(0, parallel, fused, weights)


def test_a_perturbed_weight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of one packed weight, off by 1e-6, in float64."""
    parallel, fused, weights = regions(stack())
    cat = next(node for node in fused.graph.nodes if ops.op_name(node) == "cat")

    def shifted(parts: Any, dim: int) -> torch.Tensor:
        value = torch.cat(parts, dim)
        value.view(-1)[3] += 1e-6
        return value

    cat.target = shifted
    with pytest.raises(VerificationError):
        verify_group(0, parallel, fused, weights)


def test_nan_in_one_form_only_fails_and_in_both_passes() -> None:
    parallel, fused, weights = regions(stack())
    name = next(name for name in weights if "down" in name)
    poisoned = {**weights, name: torch.full_like(weights[name], float("nan"))}
    assert verify_group(0, parallel, fused, poisoned).passed
    silu = next(node for node in fused.graph.nodes if ops.op_name(node) == "silu")
    silu.target = lambda x, inplace=False: x / 0.0
    with pytest.raises(VerificationError, match="inf"):
        verify_group(0, parallel, fused, weights)


def test_weights_on_meta_cannot_be_verified() -> None:
    parallel, fused, weights = regions(stack())
    missing = {name: value.to("meta") for name, value in weights.items()}
    with pytest.raises(VerificationError, match="meta device"):
        verify_group(0, parallel, fused, missing)


def _break_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the gains out of the folded weights."""
    from fxfusion.passes.pack_weights import WeightPacker

    monkeypatch.setattr(WeightPacker, "_fold_gains", lambda self, member, rows: rows)


def test_the_backend_does_not_run_what_was_not_proved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _break_packing(monkeypatch)
    model, x = stack(), tokens()
    options = {"compiler": "eager", "verify": "numeric", "form": "concatenated"}
    torch._dynamo.reset()
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options=options)
    assert torch.equal(run(x), model(x)) and "differs from the parallel form" in caplog.text
    torch._dynamo.reset()
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options={**options, "strict": True})
    with pytest.raises(VerificationError):
        run(x)
    with pytest.raises(VerificationError):
        fuse(model, x, verify="numeric")
