"""lift_weights: packed weights leave the graph, the calling convention stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from fxfusion import fuse_graph
from fxfusion.compiler.pipeline import fuse_captured
from fxfusion.graph import ops
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import Plain, assert_exact, capture, graph_text, parallel_form, stack, tokens


def test_new_inputs_come_last_and_old_ones_stay() -> None:
    model, x = stack(), tokens()
    captured = capture(model, x)
    fused = fuse_captured(captured, FusionPolicy())
    before = [node.name for node in captured.module.graph.nodes if node.op == "placeholder"]
    after = [node.name for node in fused.module.graph.nodes if node.op == "placeholder"]
    (pack,) = fused.packs
    assert after == [*before, *pack.values] and len(pack.values) == 3
    assert set(pack.sources) < set(before)
    packed = pack.module(*[captured.values[name] for name in pack.sources])
    assert_exact(fused.module(*captured.inputs, *packed)[0], parallel_form(model, x), torch.float64)


def test_one_pack_per_group_with_its_own_sources() -> None:
    captured = capture(stack(count=4), tokens())
    fused = fuse_captured(captured, FusionPolicy(max_members=2))
    first, second = fused.packs
    assert (first.index, second.index) == (0, 1)
    assert not set(first.sources) & set(second.sources)
    assert first.module.code == second.module.code, "equal computations have equal code: it is a cache key"


def test_the_pack_knows_nothing_of_the_graph() -> None:
    """The same model captured for another length gives the same key."""
    model = stack(Plain, nn.LayerNorm)
    codes = {fuse_captured(capture(model, tokens(seq=seq)), FusionPolicy()).packs[0].module.code for seq in (3, 5)}
    assert len(codes) == 1


def test_attributes_of_traced_modules_become_parameters() -> None:
    model, x = stack(Plain, nn.LayerNorm), tokens()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    fused, _ = fuse_graph(fx.symbolic_trace(model), [x])
    assert sorted(name for name, _ in fused.named_parameters()) == [f"packed_0_{i}" for i in range(4)]
    assert all(value.requires_grad for value in fused.parameters())
    assert_exact(fused(x), parallel_form(model, x), torch.float64)
    assert [node.op for node in fused.graph.nodes if node.op == "placeholder"] == ["placeholder"]


def test_weights_that_are_inputs_stay_inputs() -> None:
    """`fuse_graph` on a Dynamo graph: its caller passes weights, and may pass others."""
    model, x = stack(), tokens()
    captured = capture(model, x)
    fused, _ = fuse_graph(captured.module, captured.inputs)
    assert_exact(fused(*captured.inputs)[0], parallel_form(model, x), torch.float64)
    other = [v * 1.5 if isinstance(v, nn.Parameter) else v for v in captured.inputs]
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    assert_exact(fused(*other)[0], parallel_form(model, x), torch.float64)
    assert any(ops.op_name(node) == "cat" for node in fused.graph.nodes)


def test_golden_after(golden: Callable[[str, str], None]) -> None:
    captured = capture(stack(Plain, nn.LayerNorm, widths=(4, 6)), tokens())
    fused = fuse_captured(captured, FusionPolicy())
    from dataclasses import replace

    golden("lift_weights.after", graph_text(replace(captured, module=fused.module)))
    golden("lift_weights.pack", graph_text(replace(captured, module=fused.packs[0].module)))
