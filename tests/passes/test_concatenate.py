"""concatenate: exact against the parallel form, in every dtype, spelling and mixture of members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion import fuse_graph
from fxfusion.errors import PassError
from fxfusion.graph import ops
from fxfusion.passes.concatenate import GROUP_TAG, Concatenate
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
    run_graph,
    run_passes,
    stack,
    tokens,
)
from tests.passes.test_parallelise import planned

Build = Callable[[], Stack]


def halves(h: Tensor) -> Sequence[Tensor]:
    return h.chunk(2, -1)


def slices(h: Tensor) -> Sequence[Tensor]:
    return h[..., :12], h[..., 12:]


def interleaved(h: Tensor) -> Sequence[Tensor]:
    return h[..., ::2], h[..., 1::2]


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
    model = Stack(blocks)
    randomise(model)
    return model


def mixed_biases() -> Stack:
    model = of(*(Block(nn.LayerNorm(8), Plain(bias=bias)) for bias in (True, False, True)))
    model.layers[0].ffn.fc2.bias = None
    return model


BUILDS: dict[str, Build] = {
    "gated": lambda: stack(),
    "gated_bias": lambda: stack(Gated, bias=True),
    "plain_layer_norm": lambda: stack(Plain, nn.LayerNorm),
    "unequal_widths": lambda: stack(Gated, widths=(4, 12, 20)),
    "unequal_widths_plain": lambda: stack(Plain, nn.LayerNorm, widths=(4, 12, 20)),
    "one_plus_w": lambda: stack(Gated, lambda hidden: Rms(hidden, offset=1.0)),
    "no_norm": lambda: stack(Plain, lambda hidden: nn.Identity()),
    "norm_without_weights": lambda: stack(Plain, lambda hidden: nn.LayerNorm(hidden, elementwise_affine=False)),
    "biases_in_some": mixed_biases,
    "one_bias_only": lambda: of(Block(Rms(8), Plain(bias=False)), Block(Rms(8), Plain(bias=True))),
    "packed_chunk": lambda: of(*(Block(Rms(8), Packed(halves, width=w)) for w in (12, 12, 4))),
    "packed_slices": lambda: of(*(Block(Rms(8), Packed(slices)) for _ in range(2))),
    "packed_interleaved": lambda: of(*(Block(Rms(8), Packed(interleaved)) for _ in range(2))),
    "in_place": lambda: stack(InPlace),
    "tails": lambda: of(*(Block(Rms(8), Tail(factor)) for factor in (0.5, 2.0, -1.0))),
    "tails_bias": lambda: of(*(Block(Rms(8), Tail(factor, True)) for factor in (0.5, 2.0))),
}


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("name", BUILDS)
def test_exact_in_float64_with_gradients(name: str, norm: Any) -> None:
    model, x = BUILDS[name](), tokens().requires_grad_()
    fused, report = fuse(model, x, policy={"norm": norm}, verify="numeric")
    assert [len(group.members) for group in report.groups] == [len(model.layers)]
    got, wanted = fused(x), parallel_form(model, x, norm=norm)
    assert_exact(got, wanted, torch.float64)
    one, other = (torch.autograd.grad(value.square().sum(), x)[0] for value in (got, wanted))
    assert_exact(one, other, torch.float64, gradient=True)
    assert sum(ops.op_name(node) == "linear" for node in fused.graph.nodes) <= 3
    assert not any(node.users == {} and node.op == "call_function" for node in fused.graph.nodes)
    assert error_of(got, parallel_form(BUILDS[name]().apply(_perturb), x, norm=norm)) > 1e-4


def _perturb(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        with torch.no_grad():
            module.weight[0, 0] += 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize("kind", [Gated, Plain])
def test_lower_precisions(dtype: torch.dtype, norm: Any, kind: type[nn.Module]) -> None:
    shape = {"count": 4, "hidden": 64, "widths": (96, 128, 96, 160)}
    model = stack(kind, Float32Rms, **shape, dtype=dtype)
    x = tokens(4, 16, 64, dtype=dtype)
    exact = stack(kind, Float32Rms, **shape).double()
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
def test_any_number_of_token_axes(shape: tuple[int, ...]) -> None:
    model, x = stack(), torch.randn(*shape, dtype=torch.float64)
    fused, report = fuse(model, x)
    assert len(report.groups) == 1
    if x.numel():
        assert_exact(fused(x), parallel_form(model, x), torch.float64)
    assert fused(x).shape == x.shape


def test_idempotent() -> None:
    model, x = stack(), tokens()
    once, _ = fuse(model, x)
    again, report = fuse_graph(once, [x])
    assert not report.groups and torch.equal(again(x), once(x))


def test_fusing_the_rest_later_by_another_plan() -> None:
    """Marks of the first fusion must not be taken for those of the second."""
    model, x = stack(count=5), tokens()
    once, _ = fuse(model, x, plan={"groups": [["layers.3.ffn", "layers.4.ffn"]]}, verify="numeric")
    plan = {"groups": [["layers.0.ffn", "layers.1.ffn"]]}
    twice, report = fuse_graph(once, [x], plan=plan, verify="numeric")
    assert len(report.groups) == 1
    assert_exact(twice(x), parallel_form(model, x, [[0, 1], [3, 4]]), torch.float64)


def test_created_nodes_say_where_they_come_from() -> None:
    fused, report = fuse(stack(count=2), tokens())
    made = [node.meta["fxfusion"] for node in fused.graph.nodes if "fxfusion" in node.meta]
    assert made and all(found["from"] == ["layers.0.ffn", "layers.1.ffn"] for found in made)
    assert {found["pass"] for found in made} == {"concatenate"}


def test_a_member_left_behind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfusion.passes.concatenate.erase_members", lambda *_: None)
    work, groups = planned(stack(InPlace))
    with pytest.raises(PassError, match="still computed by itself"):
        run_passes(work.module, [Parallelise(groups), Concatenate(groups)], History())


def test_golden_before_and_after(golden: Callable[[str, str], None]) -> None:
    model = stack(Plain, nn.LayerNorm, widths=(4, 6))
    work, groups = planned(model)
    run_passes(work.module, [Parallelise(groups)], History())
    golden("concatenate.before", graph_text(work))
    run_passes(work.module, [Concatenate(groups)], History())
    golden("concatenate.after", graph_text(work))
    assert [node.meta[GROUP_TAG] for node in work.module.graph.nodes if GROUP_TAG in node.meta] == [0]
    assert_exact(run_graph(work), parallel_form(model, tokens()), torch.float64)
