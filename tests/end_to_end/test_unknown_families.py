"""Architectures that no list names: spellings of norms, gates and residual additions made up here.

Each stack starts with a block that also mixes tokens and goes on with FFN blocks of unequal widths;
the parallel form is `x + sum(block(x) - x)`, computed by the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion import ffn_fusion
from fxfusion.backend import last_reports
from tests.end_to_end.families import hide_names, make_inputs, make_model, parallel_form, relative, run
from tests.end_to_end.family_table import family_named

pytestmark = pytest.mark.usefixtures("clean_dynamo")

HIDDEN = 16
WIDTHS = (24, 40, 24, 8)
OPTIONS = {"compiler": "eager", "verify": "numeric", "strict": True, "policy": {"include_leading": False}}


class Block(nn.Module):
    """Parameters by shape; a made-up way to pool over earlier tokens where `pools` is set."""

    def __init__(self, width: int, pools: bool) -> None:
        super().__init__()
        self.width = width
        self.shuffle = nn.Linear(HIDDEN, HIDDEN, bias=False) if pools else None
        for name, shape in self.shapes(width).items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def think(self, x: Tensor) -> Tensor:
        """x plus the branch."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffle is not None:
            x = x + self.shuffle(torch.cumsum(x, dim=1) / (1 + torch.arange(x.shape[1])).unsqueeze(-1))
        return self.think(x)


class BareMatrices(Block):
    """Weights stand on the right as [in, out]; a mean-absolute norm; an arctangent gate; x comes last."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"zork": (HIDDEN,), "left": (HIDDEN, width), "right": (HIDDEN, width), "back": (width, HIDDEN)}

    def think(self, x: Tensor) -> Tensor:
        n = self.zork * x / x.abs().mean(-1, keepdim=True)
        return (torch.atan(n @ self.left) * (n @ self.right)) @ self.back + x


class FlatRange(Block):
    """Tokens flattened; a range norm with gain and shift; addmm with biases; a scale per channel."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        vectors = {name: (HIDDEN,) for name in ("gain", "shift", "out_bias", "scale")}
        return vectors | {"w_in": (HIDDEN, width), "in_bias": (width,), "w_out": (width, HIDDEN)}

    def think(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        spread = flat.amax(-1, keepdim=True) - flat.amin(-1, keepdim=True)
        n = (flat - flat.mean(-1, keepdim=True)) / spread * self.gain + self.shift
        h = F.hardswish(torch.addmm(self.in_bias, n, self.w_in))
        return (flat + self.scale * torch.addmm(self.out_bias, h, self.w_out)).view(x.shape)


class Snake(Block):
    """No norm; a periodic activation with a learned frequency for each intermediate channel."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"w1": (width, HIDDEN), "b1": (width,), "freq": (width,), "w2": (HIDDEN, width), "b2": (HIDDEN,)}

    def think(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w1, self.b1)
        h = h + torch.sin(h * self.freq).square() / self.freq
        return x.add(F.linear(h, self.w2, self.b2).mul(0.25))


class Interleaved(Block):
    """Both projections interleaved in one matrix; maxout; a length norm whose gain is an exponential."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"log_gain": (HIDDEN,), "both": (2 * width, HIDDEN), "out": (width, HIDDEN)}

    def think(self, x: Tensor) -> Tensor:
        n = F.normalize(x, dim=-1) * self.log_gain.exp()
        h = F.linear(n, self.both)
        h = torch.maximum(h[..., ::2], h[..., 1::2])
        return torch.add(F.linear(h, self.out.t().contiguous()), x)


class ThreeWays(Block):
    """Three projections, cut from one matrix in an unusual order, joined by a product and a sum."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (HIDDEN,), "all": (3 * width, HIDDEN), "out": (HIDDEN, width)}

    def think(self, x: Tensor) -> Tensor:
        n = F.rms_norm(x, (HIDDEN,), 1.0 + self.weight)
        a, b, c = torch.split(F.linear(n, self.all), self.width, dim=-1)
        return x + F.linear(torch.sigmoid(c) * a + F.mish(b), self.out) / 2


class RangeAfter(Block):
    """No norm before; a made-up norm with gain and shift on the output, in one token axis, and a number behind it."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        vectors = {name: (HIDDEN,) for name in ("zork", "blip", "out_bias")}
        return vectors | {"left": (HIDDEN, width), "right": (HIDDEN, width), "back": (width, HIDDEN)}

    def think(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        b = torch.addmm(self.out_bias, F.silu(flat @ self.left) * (flat @ self.right), self.back)
        b = (b - b.mean(1, keepdim=True)) / (b.amax(1, keepdim=True) - b.amin(1, keepdim=True))
        return (0.7 * (b * self.zork + self.blip)).view(x.shape) + x


class NormsEverywhere(Block):
    """A norm before, one over the intermediate channels behind a learned frequency, and one on the output."""

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        vectors = {"before": (HIDDEN,), "inside": (width,), "freq": (width,), "behind": (HIDDEN,)}
        return vectors | {"w1": (width, HIDDEN), "w2": (HIDDEN, width)}

    def think(self, x: Tensor) -> Tensor:
        h = F.linear(F.rms_norm(x, (HIDDEN,), self.before), self.w1)
        h = h + torch.sin(h * self.freq).square() / self.freq
        h = F.rms_norm(h, h.shape[-1:], 1.0 + self.inside)
        return torch.add(x, F.normalize(F.linear(h, self.w2), dim=-1) * self.behind.exp())


class Stack(nn.Module):
    def __init__(self, kind: Callable[[int, bool], Block]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part{n}": kind(width, n == 0) for n, width in enumerate(WIDTHS)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


def make_stack(kind: Callable[[int, bool], Block]) -> Stack:
    stack = Stack(kind).double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in stack.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(noise / 4 if value.dim() == 2 else 0.7 + 0.3 * noise)
    return stack


def parallel_of(stack: Stack, x: Tensor) -> Tensor:
    first, *others = stack.parts.values()
    x = first(x)
    return x + sum(part(x) - x for part in others)


UNSEEN = [BareMatrices, FlatRange, Snake, Interleaved, ThreeWays, RangeAfter, NormsEverywhere]


@pytest.mark.parametrize("kind", UNSEEN)
def test_an_unseen_spelling_is_fused_exactly(kind: Callable[[int, bool], Block]) -> None:
    stack = make_stack(kind)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    call = torch.compile(stack, backend=ffn_fusion, options=OPTIONS)
    with torch.no_grad():
        parallel = parallel_of(stack, x)
        difference = relative(stack(x), parallel)
        error = relative(call(x), parallel)
        for value in stack.parts["part3"].parameters():
            value.mul_(1.01)
        changed, refreshed = parallel_of(stack, x), call(x)
    assert difference > 0.01
    assert error <= 1e-10
    assert relative(refreshed, changed) <= 1e-10
    assert relative(refreshed, parallel) > 1e-4
    assert [len(group.members) for group in last_reports()[-1].groups] == [3]


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cohere", "opt"))])
def test_class_names_do_not_matter(name: str) -> None:
    family = family_named(name)
    model = hide_names(make_model(family))
    assert {type(m).__name__[0] for m in model.modules() if type(m).__module__ == "nowhere"} == {"C"}
    inputs = make_inputs(family, model)
    expected = parallel_form(model, family, inputs)
    found = run(torch.compile(model, backend=ffn_fusion, options=OPTIONS), inputs)
    error = relative(found, expected)
    assert error <= family.limit
    assert [len(group.members) for group in last_reports()[-1].groups] == [family.fused]
