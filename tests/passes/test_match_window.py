"""match_window: which windows can be had, and why others cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion import FusionPlan, explain, fuse_graph
from fxfusion.errors import Refusal, RefusalCode
from fxfusion.graph import ops
from fxfusion.passes.ffn import Window
from fxfusion.passes.match_residual import match_residual
from fxfusion.passes.match_window import WindowMatcher
from fxfusion.plan.groups import PlannedGroup
from fxfusion.plan.policy import NormMode
from tests.helpers import (
    Attention,
    Block,
    Gated,
    Rms,
    Stack,
    assert_exact,
    capture,
    error_of,
    facts_of,
    normalise,
    randomise,
    tokens,
)
from tests.passes.test_check_group import GainInside
from tests.passes.test_find_chains import Layer
from tests.passes.test_hoist_mixers import decoder


def match(model: nn.Module, *members: int | str, norm: NormMode = "fold") -> Window | Refusal:
    facts = facts_of(normalise(capture(model, tokens())))
    names = PlannedGroup(members, "hoist")
    found = WindowMatcher(match_residual(facts, {}), facts, norm).match([names])
    return found.windows[0] if found.windows else found.refusals[names]


def test_members_and_mixers_in_order() -> None:
    found = match(decoder(4), 1, 2, 3)
    assert isinstance(found, Window)
    assert [ffn.layer for ffn in found.members] == ["layers.1", "layers.2", "layers.3"]
    assert [mixer.layer for mixer in found.mixers] == ["layers.2", "layers.3"]
    by_path = match(decoder(4), "layers.2.mlp.ffn", "layers.1.mlp.ffn")
    assert isinstance(by_path, Window) and len(by_path.mixers) == 1


def test_a_layer_without_attention_has_nothing_to_move() -> None:
    found = match(randomise(Stack([Layer(True), Layer(False), Layer(True)])), 0, 1, 2)
    assert isinstance(found, Window) and [mixer.layer for mixer in found.mixers] == ["layers.2"]


class Parallel(nn.Module):
    """x + attention(x) + ffn(x), both reading x."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Block(Rms(8), Gated())

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + (self.mlp.ffn(self.mlp.norm(x)))


class PostNorm(Layer):
    def __init__(self) -> None:
        super().__init__(True)
        self.after = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.mlp(self.after(self.attention(x))))


class Recurrent(nn.Module):
    """The FFN mixes tokens: it reads a running mean of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Block(Rms(8), Gated())

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.mlp.ffn(self.mlp.norm(x.cumsum(1)))


class Relu(Layer):
    def __init__(self) -> None:
        super().__init__(True)
        self.mlp = Block(Rms(8), Gated(act=F.relu))


@pytest.mark.parametrize(
    ("layer", "members", "message"),
    [
        (None, (1, 3), "window [1, 3]: the FFN of layers.2 lies inside it; a window names every FFN in it"),
        (None, (3, 4), "window [3, 4]: 4 holds no FFN of this graph; FFNs were found in layers [0, 1, 2, 3]"),
        (None, (8, 9), "window [8, 9]: none of them holds an FFN of this graph"),
        (Parallel, (1, 2), "window [1, 2]: 2 holds no FFN of this graph; FFNs were found in layers [0, 1, 3]"),
        (Parallel, (1, 3), "window [1, 3]: layers.2 between layers.1.mlp.ffn and layers.3 cannot move: the branch"),
        (PostNorm, (1, 2), "window [1, 2]: between layers.1.mlp.ffn and layers.2.mlp.ffn the stream passes layer_norm"),
        (Recurrent, (1, 2), "window [1, 2]: 2 holds no FFN of this graph; FFNs were found in layers [0, 1, 3]"),
        (Recurrent, (2, 3), "(token_mixing: cumsum lets one token see another)"),
        (Relu, (1, 2), "window [1, 2]: layers.2.mlp.ffn: differs from layers.1.mlp.ffn: "),
    ],
)
def test_what_cannot_move_is_refused_with_its_layers(layer: Any, members: tuple[int, ...], message: str) -> None:
    layers = [Layer(True) if layer is None or number != 2 else layer() for number in range(4)]
    found = match(randomise(Stack(layers)), *members)
    assert isinstance(found, Refusal) and message in found.message


class Unproved(Layer):
    """The weight of its FFN's norm is no gain, so it cannot be folded."""

    def __init__(self) -> None:
        super().__init__(True)
        self.mlp = Block(GainInside(), Gated())


@pytest.mark.parametrize("norm", ["fold", "last"])
def test_a_window_moves_only_where_its_norms_fit(norm: NormMode) -> None:
    found = match(randomise(Stack([Unproved() for _ in range(3)])), 1, 2, norm=norm)
    if norm == "fold":
        assert isinstance(found, Refusal) and "window [1, 2]: layers.2.mlp.ffn" in found.message
        assert "not proved to be a gain" in found.message
        return
    assert isinstance(found, Window) and [mixer.layer for mixer in found.mixers] == ["layers.2"]


def test_the_last_norm_serves_the_window() -> None:
    model, x = randomise(Stack([Unproved() for _ in range(3)])), tokens()
    captured = capture(model, x)
    policy = {"windows": [[1, 2]], "norm": "last"}
    fused, report = fuse_graph(captured.module, captured.inputs, policy=policy, verify="numeric")
    assert [group.moved for group in report.groups] == [("layers.2",)]
    first, one, two = model.layers
    stream = two.attention(one.attention(first(x)))
    wanted = stream + sum(layer.mlp.ffn(two.mlp.norm(stream)) for layer in (one, two))
    own = stream + sum(layer.mlp.ffn(layer.mlp.norm(stream)) for layer in (one, two))
    (found,) = fused(*captured.inputs)
    assert_exact(found, wanted, torch.float64)
    assert error_of(own, wanted) > 1e-2, "the comparison can fail"


class Watched(nn.Module):
    """Gives the stream after each layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = decoder(3).layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen = []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return tuple(seen)


def test_another_reader_of_the_stream_is_refused() -> None:
    found = match(Watched(), 0, 1)
    assert isinstance(found, Refusal) and found.code is RefusalCode.PLAN_UNMATCHED
    assert "output also reads the stream after layers.0.mlp.ffn, before layers.1" in found.message


class Fed(nn.Module):
    """The second attention is gated, by what its layer's input was before the first FFN, or after it."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.layers, self.after = decoder(2).layers, after
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.layers
        y = one.attention(x)
        inner = one.mlp.ffn(one.mlp.norm(y))
        f = y + inner
        g = torch.sigmoid(self.gate(inner if self.after else y))
        z = f + two.attention.out(two.attention(f) * g)
        return two.mlp(z)


def test_another_input_of_a_mixer_may_come_from_before_the_ffns() -> None:
    found = match(randomise(Fed(after=False)), "layers.0.mlp.ffn", "layers.1.mlp.ffn")
    assert isinstance(found, Window) and len(found.mixers) == 1


def test_another_input_of_a_mixer_may_not_depend_on_the_ffns() -> None:
    found = match(randomise(Fed(after=True)), "layers.0.mlp.ffn", "layers.1.mlp.ffn")
    assert isinstance(found, Refusal), "its attention must not move before the FFN that feeds its gate"


class Memory(nn.Module):
    """The third attention also reads what the second wrote, which depends on the first FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = decoder(3).layers

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.layers
        x = one(x)
        seen = two.attention(x) - x
        x = two.mlp(x + seen)
        x = x + three.attention.out(three.attention(x) * torch.sigmoid(seen))
        return three.mlp(x)


def test_what_a_mixer_reads_of_an_earlier_mixer_moves_only_with_it() -> None:
    found = match(randomise(Memory()), "layers.0.mlp.ffn", "layers.2.mlp.ffn", "layers.1.mlp.ffn")
    assert isinstance(found, Refusal) and "also reads" in found.message


def test_a_window_that_does_not_fit_is_not_moved() -> None:
    """Nothing moves where the FFNs could not be fused afterwards."""
    model = randomise(Stack([Layer(True), Layer(True), Relu(), Layer(True)]))
    x = tokens()
    captured = capture(model, x)
    fused, report = fuse_graph(captured.module, captured.inputs, plan=FusionPlan(groups=[[0, 1], [2, 3]], hoist=True))
    assert [group.moved for group in report.groups] == [("layers.1",)]
    assert "group" not in report.refusals[-1].message or "window [2, 3]" in report.refusals[-1].message
    order = [ops.op_name(node) for node in fused.graph.nodes]
    assert order.count("scaled_dot_product_attention") == 4


def test_rules_apply_beside_a_window() -> None:
    """Layers 2 to 5 have no attention: the window is exactly its members, the others follow the policy."""
    model = randomise(Stack([Layer(number < 2) for number in range(6)]))
    report = explain(model, tokens(), policy={"windows": [[0, 1]], "keep_last": 1})
    found = [[member.layer for member in group.members] for group in report.groups]
    assert found == [["layers.0", "layers.1"], ["layers.2", "layers.3", "layers.4"]]
    assert [group.mixers for group in report.groups] == ["hoist", "none"]
    assert [block.window for block in report.main.blocks_before if block.kind == "mixer"] == [None, 0]
    assert "Windows (approximate" in str(report) and "moved before the FFNs of its window, group 0" in _page(report)


def _page(report: Any) -> str:
    from fxfusion.report.html import render

    return render(report)
