"""concatenate: exact against the parallel form, in every dtype, spelling and mixture of members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion import ffn_fusion, fuse_graph, last_reports
from fxfusion.errors import PassError, RefusalCode
from fxfusion.graph import ops
from fxfusion.passes.concatenate import STANDS_FOR, Concatenate
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
    run_graph,
    run_passes,
    stack,
    tokens,
)
from tests.passes.output_norms import PostBlock, post_stack
from tests.passes.test_parallelise import planned

Build = Callable[[], Stack]


def halves(h: Tensor) -> Sequence[Tensor]:
    return h.chunk(2, -1)


class InPlace(Plain):
    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(n), inplace=True))


class Tail(Gated):
    """A multiplier, LayerScale and a shift behind the down projection, different in each member."""

    def __init__(self, factor: float, bias: bool = False) -> None:
        super().__init__(bias=bias)
        self.factor = factor
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

    def forward(self, n: Tensor) -> Tensor:
        return (super().forward(n) * self.scale + self.shift) * self.factor


def of(*blocks: nn.Module) -> Stack:
    return randomise(Stack(blocks))


def mixed_biases() -> Stack:
    model = of(*(Block(nn.LayerNorm(8), Plain(bias=bias)) for bias in (True, False, True)))
    model.layers[0].ffn.fc2.bias = None
    return model


def plus_one(hidden: int) -> nn.Module:
    return Rms(hidden, offset=1.0)


def weightless(hidden: int) -> nn.Module:
    return nn.LayerNorm(hidden, elementwise_affine=False)


WIDE: dict[str, Build] = {
    "gated": lambda: stack(),
    "gated_bias": lambda: stack(Gated, bias=True),
    "plain_layer_norm": lambda: stack(Plain, nn.LayerNorm),
    "unequal_widths": lambda: stack(Gated, widths=(4, 12, 20)),
    "unequal_widths_plain": lambda: stack(Plain, nn.LayerNorm, widths=(4, 12, 20)),
    "one_plus_w": lambda: stack(Gated, plus_one),
    "no_norm": lambda: stack(Plain, lambda hidden: nn.Identity()),
    "norm_without_weights": lambda: stack(Plain, weightless),
    "biases_in_some": mixed_biases,
    "one_bias_only": lambda: of(Block(Rms(8), Plain(bias=False)), Block(Rms(8), Plain(bias=True))),
    "packed_chunk": lambda: of(*(Block(Rms(8), Packed(halves, width=w)) for w in (12, 12, 4))),
    "packed_slices": lambda: of(*(Block(Rms(8), Packed(lambda h: (h[..., :12], h[..., 12:]))) for _ in range(2))),
    "packed_interleaved": lambda: of(*(Block(Rms(8), Packed(lambda h: (h[..., ::2], h[..., 1::2]))) for _ in "ab")),
    "in_place": lambda: stack(InPlace),
    "tails": lambda: of(*(Block(Rms(8), Tail(factor)) for factor in (0.5, 2.0, -1.0))),
    "tails_bias": lambda: of(*(Block(Rms(8), Tail(factor, True)) for factor in (0.5, 2.0))),
}
GROUPED: dict[str, Build] = {
    "output_only": lambda: post_stack(),
    "sandwich": lambda: post_stack(norm=Rms),
    "output_one_plus_w": lambda: post_stack(plus_one, plus_one),
    "output_layer_norm": lambda: post_stack(nn.LayerNorm, nn.LayerNorm, ffn=Plain),
    "torch_rms": lambda: post_stack(nn.RMSNorm, nn.RMSNorm),
    "weightless": lambda: post_stack(weightless),
    "scaled": lambda: post_stack(norm=Rms, scale=0.4),
    "flat": lambda: post_stack(norm=Rms, flat=True),
    "output_unequal_widths": lambda: post_stack(norm=nn.LayerNorm, widths=(4, 12, 20)),
    "output_biases": lambda: post_stack(ffn=Plain, widths=(4, 12)),
    "output_packed": lambda: post_stack(norm=Rms, ffn=lambda **sizes: Packed(halves, **sizes)),
}


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("name", [*WIDE, *GROUPED])
def test_exact_in_float64_with_gradients(name: str, norm: Any) -> None:
    model, x = (WIDE | GROUPED)[name](), tokens().requires_grad_()
    fused, report = fuse(model, x, policy={"norm": norm}, verify="numeric")
    form, own_downs = ("grouped", len(model.layers)) if name in GROUPED else ("concatenated", 1)
    assert [(group.form, len(group.members)) for group in report.groups] == [(form, len(model.layers))]
    got, wanted = fused(x), parallel_form(model, x, norm=norm)
    assert_exact(got, wanted, torch.float64)
    one, other = (torch.autograd.grad(value.square().sum(), x)[0] for value in (got, wanted))
    assert_exact(one, other, torch.float64, gradient=True)
    projections = 2 if hasattr(model.layers[0].ffn, "up") else 1
    assert sum(ops.op_name(node) == "linear" for node in fused.graph.nodes) == projections + own_downs
    assert not any(node.users == {} and node.op == "call_function" for node in fused.graph.nodes)
    assert error_of(got, model(x)) > 1e-3, "the parallel form is the sequential one: the comparison shows nothing"
    with torch.no_grad():
        for part in (model.layers[1].ffn, getattr(model.layers[1], "output", nn.Identity())):
            part.apply(lambda each: [value.mul_(1.1) for value in each.parameters(recurse=False)])
    assert error_of(got, parallel_form(model, x, norm=norm)) > 1e-4 or name == "weightless"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("kind", [Gated, Plain, PostBlock])
def test_lower_precisions(dtype: torch.dtype, norm: Any, kind: type[nn.Module]) -> None:
    def build(dtype: torch.dtype) -> Stack:
        sizes = {"hidden": 64, "widths": (96, 128, 96, 160), "dtype": dtype}
        return post_stack(Float32Rms, Float32Rms, **sizes) if kind is PostBlock else stack(kind, Float32Rms, **sizes)

    model, exact, x = build(dtype), build(torch.float64), tokens(4, 16, 64, dtype=dtype)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    truth = parallel_form(exact, x.double(), norm=norm)
    fused, _ = fuse(model, x, policy={"norm": norm}, verify="numeric")
    assert_exact(fused(x), parallel_form(model, x, norm=norm), dtype, truth=truth)
    with pytest.raises(AssertionError):
        assert_exact(fused(x) * 1.02, parallel_form(model, x, norm=norm), dtype, truth=truth)


def test_float32_inside_a_float64_model() -> None:
    model, x = stack(Gated, Float32Rms), tokens()
    fused, report = fuse(model, x, verify="numeric")
    assert_exact(fused(x), parallel_form(model, x), torch.float64, float32_inside=True)
    assert report.verifications[0]["limit"] == 1e-6


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 5, 8), (0, 5, 8), (2, 0, 8)])
@pytest.mark.parametrize("build", [stack, lambda: post_stack(norm=Rms)])
def test_any_number_of_token_axes(build: Build, shape: tuple[int, ...]) -> None:
    model, x = build(), torch.randn(*shape, dtype=torch.float64)
    fused, report = fuse(model, x)
    assert len(report.groups) == 1 and fused(x).shape == x.shape
    if x.numel():
        assert_exact(fused(x), parallel_form(model, x), torch.float64)


@pytest.mark.parametrize("build", [stack, lambda: post_stack(norm=Rms)])
def test_idempotent(build: Build) -> None:
    model, x = build(), tokens()
    once, _ = fuse(model, x)
    again, report = fuse_graph(once, [x])
    assert not report.groups and torch.equal(again(x), once(x))


def test_compiled_trains_changes_shape_and_is_never_stale() -> None:
    """Gradients of every parameter, other numbers of tokens, and weights changed behind the compiler's back."""
    model, reference = post_stack(norm=Rms), post_stack(norm=Rms)
    options = {"compiler": "aot_eager", "verify": "numeric", "strict": True, "form": "concatenated"}
    torch._dynamo.reset()
    call = torch.compile(model, backend=ffn_fusion, options=options)  # the second shape makes it dynamic
    for seq in (5, 9, 3):
        x = tokens(seq=seq)
        model.zero_grad(), reference.zero_grad()
        got, wanted = call(x), parallel_form(reference, x)
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
            assert_exact(call(x), parallel_form(reference, x), torch.float64)
    assert error_of(call(x), stale) > 1e-3


def test_neighbours_of_both_forms_in_one_chain() -> None:
    """Each group begins where another one, of another form, ends."""
    wide = stack(count=4).layers
    grouped = post_stack(norm=Rms, widths=(12, 4, 12, 12)).layers
    model, x = Stack([*wide[:2], *grouped[:2], *wide[2:], *grouped[2:]]), tokens()
    fused, report = fuse(model, x, verify="numeric")
    assert [group.form for group in report.groups] == ["concatenated", "grouped", "concatenated", "grouped"]
    expected = parallel_form(model, x, [[0, 1], [2, 3], [4, 5], [6, 7]])
    assert_exact(fused(x), expected, torch.float64)
    assert error_of(model(x), expected) > 1e-3


def test_fusing_the_rest_later_by_another_plan() -> None:
    """Marks of the first fusion must not be taken for those of the second."""
    model, x = stack(count=5), tokens()
    once, _ = fuse(model, x, plan={"groups": [["layers.3.ffn", "layers.4.ffn"]]}, verify="numeric")
    plan = {"groups": [["layers.0.ffn", "layers.1.ffn"]]}
    twice, report = fuse_graph(once, [x], plan=plan, verify="numeric")
    assert len(report.groups) == 1
    assert_exact(twice(x), parallel_form(model, x, [[0, 1], [3, 4]]), torch.float64)


SCALED = lambda: PostBlock(Gated(), Rms(8), Rms(8), 0.25)  # noqa: E731
PLAIN = lambda: PostBlock(Gated(), Rms(8), Rms(8))  # noqa: E731
MISFITS: dict[str, tuple[Build, Build, RefusalCode, str]] = {
    "no norm": (PLAIN, lambda: Block(Rms(8), Gated()), RefusalCode.DIFFERENT_OPS, "a norm on the output"),
    "norm": (PLAIN, lambda: PostBlock(Gated(), nn.LayerNorm(8), Rms(8)), RefusalCode.DIFFERENT_OPS, "layer_norm"),
    "eps": (PLAIN, lambda: PostBlock(Gated(), Rms(8, 1e-5), Rms(8)), RefusalCode.DIFFERENT_LITERAL, "1e-05"),
    "scale": (SCALED, lambda: PostBlock(Gated(), Rms(8), Rms(8), 0.5), RefusalCode.DIFFERENT_LITERAL, "0.5"),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_another_output_norm_does_not_fit(misfit: tuple[Build, Build, RefusalCode, str]) -> None:
    one, other, code, words = misfit
    model, x = of(one(), other()), tokens()
    fused, report = fuse(model, x)
    assert not report.groups and torch.equal(fused(x), model(x))
    refusal_with(report.refusals, code, words)


def test_only_gate_and_up_are_packed_before_output_norms() -> None:
    _, report = fuse(post_stack(widths=(12, 4)), tokens())
    assert report.groups[0].packed_bytes == 2 * 8 * (12 + 4) * 8  # weights, hidden, widths, bytes of float64
    assert "grouped" in str(report)


def test_created_nodes_say_where_they_come_from() -> None:
    fused, _ = fuse(stack(count=2), tokens())
    made = [node.meta["fxfusion"] for node in fused.graph.nodes if "fxfusion" in node.meta]
    assert made and all(found["from"] == ["layers.0.ffn", "layers.1.ffn"] for found in made)
    assert {found["pass"] for found in made} == {"concatenate"}


def test_a_member_left_behind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Concatenate, "_erase_members", lambda *_: None)
    work, groups = planned(stack(InPlace))
    with pytest.raises(PassError, match="still computed by itself"):
        run_passes(work.module, [Parallelise(groups), Concatenate(groups)], History())


GOLDEN: dict[str, Build] = {
    "concatenate": lambda: stack(Plain, nn.LayerNorm, widths=(4, 6)),
    "concatenate_grouped": lambda: post_stack(nn.LayerNorm, nn.LayerNorm, ffn=Plain, widths=(4, 6)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_before_and_after(name: str, golden: Callable[[str, str], None]) -> None:
    model = GOLDEN[name]()
    work, groups = planned(model)
    run_passes(work.module, [Parallelise(groups)], History())
    golden(f"{name}.before", graph_text(work))
    ends = [group.members[-1].add.name for group in groups]
    run_passes(work.module, [Concatenate(groups)], History())
    golden(f"{name}.after", graph_text(work))
    assert [node.meta[STANDS_FOR] for node in work.module.graph.nodes if STANDS_FOR in node.meta] == ends
    assert_exact(run_graph(work), parallel_form(model, tokens()), torch.float64)
