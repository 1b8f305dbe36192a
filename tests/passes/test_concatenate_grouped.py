"""concatenate_grouped: FFNs with a norm on their output, exact against the parallel form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fxfusion import ffn_fusion, fuse_graph, last_reports
from fxfusion.errors import PassError, RefusalCode
from fxfusion.graph import ops
from fxfusion.passes.concatenate import GROUP_TAG, Concatenate
from fxfusion.passes.concatenate_grouped import ConcatenateGrouped
from fxfusion.passes.parallelise import Parallelise
from tests.helpers import (
    Block,
    Float32Rms,
    Gated,
    History,
    Packed,
    Plain,
    Rms,
    Stack,
    assert_exact,
    error_of,
    fuse,
    graph_text,
    parallel_form,
    randomise,
    refusal_with,
    rmse,
    run_graph,
    run_passes,
    stack,
    tokens,
)
from tests.passes.output_norms import PostBlock, post_parallel, post_stack
from tests.passes.test_parallelise import planned


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plus_one(hidden: int) -> nn.Module:
    return Rms(hidden, offset=1.0)


def weightless(hidden: int) -> nn.Module:
    return nn.LayerNorm(hidden, elementwise_affine=False)


BUILDS: dict[str, Callable[[], Stack]] = {
    "output_only": lambda: post_stack(),
    "sandwich": lambda: post_stack(norm=Rms),
    "one_plus_w": lambda: post_stack(plus_one, plus_one),
    "layer_norm": lambda: post_stack(nn.LayerNorm, nn.LayerNorm, ffn=Plain),
    "torch_rms": lambda: post_stack(nn.RMSNorm, nn.RMSNorm),
    "weightless": lambda: post_stack(weightless),
    "scaled": lambda: post_stack(norm=Rms, scale=0.4),
    "flat": lambda: post_stack(norm=Rms, flat=True),
    "unequal_widths": lambda: post_stack(norm=nn.LayerNorm, widths=(4, 12, 20)),
    "biases": lambda: post_stack(ffn=Plain, widths=(4, 12)),
    "packed": lambda: post_stack(norm=Rms, ffn=lambda **sizes: Packed(lambda h: h.chunk(2, -1), **sizes)),
}


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("name", BUILDS)
def test_exact_in_float64_with_gradients(name: str, norm: Any) -> None:
    model, x = BUILDS[name](), tokens().requires_grad_()
    fused, report = fuse(model, x, policy={"norm": norm}, verify="numeric")
    assert [(group.form, len(group.members)) for group in report.groups] == [("grouped", len(model.layers))]
    got, wanted = fused(x), post_parallel(model, x, norm)
    assert_exact(got, wanted, torch.float64)
    one, other = (torch.autograd.grad(value.square().sum(), x)[0] for value in (got, wanted))
    assert_exact(one, other, torch.float64, gradient=True)
    projections = 1 if name in ("layer_norm", "biases", "packed") else 2
    assert sum(ops.op_name(node) == "linear" for node in fused.graph.nodes) == projections + len(model.layers)
    assert error_of(got, model(x)) > 1e-3, "the parallel form is the sequential one: the comparison shows nothing"
    with torch.no_grad():
        model.layers[1].output.apply(lambda part: [value.mul_(1.1) for value in part.parameters()])
        model.layers[1].ffn.apply(lambda part: [value.mul_(1.1) for value in part.parameters()])
    assert error_of(got, post_parallel(model, x, norm)) > 1e-4 or name == "weightless"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_lower_precisions(dtype: torch.dtype, norm: Any) -> None:
    sizes = {"hidden": 64, "widths": (96, 128, 96, 160)}
    model = post_stack(Float32Rms, Float32Rms, **sizes, dtype=dtype)
    exact = post_stack(Float32Rms, Float32Rms, **sizes).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    x = tokens(4, 16, 64, dtype=dtype)
    truth = post_parallel(exact, x.double(), norm)
    fused, _ = fuse(model, x, policy={"norm": norm}, verify="numeric")
    assert_exact(fused(x), post_parallel(model, x, norm), dtype, truth=truth)
    with pytest.raises(AssertionError):
        assert_exact(fused(x) * 1.02, post_parallel(model, x, norm), dtype, truth=truth)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 5, 8), (2, 0, 8)])
def test_any_number_of_token_axes(shape: tuple[int, ...]) -> None:
    model, x = post_stack(norm=Rms), torch.randn(*shape, dtype=torch.float64)
    fused, report = fuse(model, x)
    assert len(report.groups) == 1 and fused(x).shape == x.shape
    if x.numel():
        assert_exact(fused(x), post_parallel(model, x), torch.float64)


def test_compiled_trains_changes_shape_and_is_never_stale() -> None:
    """Gradients of every parameter, other numbers of tokens, and weights changed behind the compiler's back."""
    model, reference = post_stack(norm=Rms), post_stack(norm=Rms)
    options = {"compiler": "aot_eager", "verify": "numeric", "strict": True, "form": "concatenated"}
    call = torch.compile(model, backend=ffn_fusion, options=options)  # the second shape makes it dynamic
    for seq in (5, 9, 3):
        x = tokens(seq=seq)
        model.zero_grad(), reference.zero_grad()
        got, wanted = call(x), post_parallel(reference, x)
        assert_exact(got, wanted, torch.float64)
        got.square().sum().backward(), wanted.square().sum().backward()
        for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None, name
            assert_exact(one.grad, other.grad, torch.float64, gradient=True)
    assert [group.form for group in last_reports()[-1].groups] == ["grouped"]
    stale = call(x).detach()
    with torch.no_grad():
        for name in ("output.weight", "ffn.down.weight", "ffn.gate.weight", "norm.weight"):
            for changed in (model, reference):
                changed.layers[1].get_parameter(name).mul_(1.5)
            assert_exact(call(x), post_parallel(reference, x), torch.float64)
    assert error_of(call(x), stale) > 1e-3


def test_neighbours_of_both_forms_in_one_chain() -> None:
    """Each group begins where another one, of another form, ends."""
    wide = stack(count=4).layers
    grouped = post_stack(norm=Rms, widths=(12, 4, 12, 12)).layers
    model, x = Stack([*wide[:2], *grouped[:2], *wide[2:], *grouped[2:]]), tokens()
    fused, report = fuse(model, x, verify="numeric")
    assert [group.form for group in report.groups] == ["concatenated", "grouped", "concatenated", "grouped"]
    expected = x
    for first in (0, 2, 4, 6):
        expected = parallel_form(Stack(model.layers[first : first + 2]), expected)
    assert_exact(fused(x), expected, torch.float64)
    assert error_of(model(x), expected) > 1e-3


class Eps(Rms):
    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, eps=1e-5)


MISFITS: dict[str, tuple[Callable[[], nn.Module], RefusalCode, str]] = {
    "no norm on its output": (lambda: Block(Rms(8), Gated()), RefusalCode.DIFFERENT_OPS, "a norm on the output"),
    "another norm": (lambda: PostBlock(Gated(), nn.LayerNorm(8), Rms(8)), RefusalCode.DIFFERENT_OPS, "layer_norm"),
    "another eps": (lambda: PostBlock(Gated(), Eps(8), Rms(8)), RefusalCode.DIFFERENT_LITERAL, "1e-05"),
    "another scale": (lambda: PostBlock(Gated(), Rms(8), Rms(8), 0.5), RefusalCode.DIFFERENT_LITERAL, "0.5"),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_members_that_do_not_fit(misfit: tuple[Callable[[], nn.Module], RefusalCode, str]) -> None:
    build, code, words = misfit
    model, x = Stack([PostBlock(Gated(), Rms(8), Rms(8), 0.25), build()]), tokens()
    if words == "a norm on the output" or "norm" in words or "1e-05" in words:
        model.layers[0].scale = 1.0
    randomise(model)
    fused, report = fuse(model, x)
    assert not report.groups and torch.equal(fused(x), model(x))
    refusal_with(report.refusals, code, words)


def test_fusing_twice_is_fusing_once() -> None:
    model, x = post_stack(norm=Rms), tokens()
    once, _ = fuse(model, x)
    again, report = fuse_graph(once, [x])
    assert not report.groups and torch.equal(again(x), once(x))


def test_other_groups_are_left_alone() -> None:
    work, groups = planned(stack(Plain, nn.LayerNorm))
    run_passes(work.module, [Parallelise(groups)], History())
    before = graph_text(work)
    history = History()
    run_passes(work.module, [ConcatenateGrouped(groups)], history)
    assert graph_text(work) == before and history.records[-1].changed == 0


def test_a_member_left_behind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPlace(Plain):
        def forward(self, n: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.relu_(self.fc1(n)))

    monkeypatch.setattr("fxfusion.passes.concatenate_grouped.erase_members", lambda *_: None)
    work, groups = planned(post_stack(ffn=InPlace))
    with pytest.raises(PassError, match="still computed by itself"):
        run_passes(work.module, [Parallelise(groups), Concatenate(groups), ConcatenateGrouped(groups)], History())


def test_only_gate_and_up_are_packed() -> None:
    _, report = fuse(post_stack(widths=(12, 4)), tokens())
    assert report.groups[0].packed_bytes == 2 * 8 * (12 + 4) * 8  # weights, hidden, widths, bytes of float64
    assert "grouped" in str(report)


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    model = post_stack(nn.LayerNorm, nn.LayerNorm, ffn=Plain, widths=(4, 6))
    work, groups = planned(model)
    run_passes(work.module, [Parallelise(groups), Concatenate(groups)], History())
    golden("concatenate_grouped.before", graph_text(work))
    run_passes(work.module, [ConcatenateGrouped(groups)], History())
    golden("concatenate_grouped.after", graph_text(work))
    assert [node.meta[GROUP_TAG] for node in work.module.graph.nodes if GROUP_TAG in node.meta] == [0]
    assert_exact(run_graph(work), post_parallel(model, tokens()), torch.float64)
    assert rmse(run_graph(work), model(tokens())) > 1e-3
