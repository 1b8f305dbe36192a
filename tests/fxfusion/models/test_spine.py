from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxfusion.compiler.capture import capture_model
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.models.spine import Addition, follow_stream
from fxfusion.models.traced import TracedModel
from tests.blocks import HIDDEN, randomise
from tests.fxfusion.models import tiny
from tests.fxfusion.models.tiny import Layer, causal, token_ids


def spine_of(*layers: Callable[[Layer, Tensor], Tensor], scale: float = 1.0) -> tuple[Addition, ...]:
    ids = token_ids()
    with torch.no_grad():
        (captured,), _ = capture_model(causal(*layers, scale=scale), (ids,), {})
    graph = captured.module.graph
    weights = (node for node in graph.nodes if node.name in captured.weights)
    return follow_stream(GraphFacts(graph, weights), ids.numel())


def post_norm(layer: Layer, x: Tensor) -> Tensor:
    x = layer.norm(x + layer.mix(x))
    return layer.norm(x + layer.ffn(x))


def inner_residual(layer: Layer, x: Tensor) -> Tensor:
    """The FFN holds an addition that looks like one to the stream."""
    h = layer.norm(x)
    return x + layer.ffn(h + layer.gate(h))


def shared_expert(layer: Layer, x: Tensor) -> Tensor:
    h = layer.norm(x)
    return x + (layer.ffn(h) + layer.gate(h))


@pytest.mark.parametrize(
    ("forms", "counts"),
    [
        ([tiny.plain] * 3, [2, 2, 2]),
        ([tiny.parallel] * 3, [1, 1, 1]),
        ([tiny.attention_then_ffn, tiny.ffn_then_attention], [2, 2]),
        ([tiny.scaled_parallel, tiny.plain], [1, 2]),
        ([tiny.inner_addition, tiny.plain], [2, 2]),
        ([post_norm, post_norm], [2, 2]),
        ([inner_residual, inner_residual], [1, 1]),
        ([shared_expert, tiny.plain], [1, 2]),
        ([tiny.scaled_output, tiny.plain], [2, 2]),
        ([tiny.in_place, tiny.in_place], [2, 2]),
    ],
    ids=lambda value: value[0].__name__ if callable(value[0]) else "",
)
def test_the_stream_passes_the_additions_of_each_layer(
    forms: list[Callable[[Layer, Tensor], Tensor]], counts: list[int]
) -> None:
    spine = spine_of(*forms, scale=2.0)
    expected = [f"layers.{layer}" for layer, count in enumerate(counts) for _ in range(count)]
    assert [addition.layer for addition in spine] == expected
    assert all({addition.stream, addition.branch} == set(addition.add.all_input_nodes) for addition in spine)


def test_a_branch_says_what_it_reads() -> None:
    first, second, third, fourth = spine_of(tiny.attention_then_ffn, tiny.plain)
    assert second.stream is first.add and second.reads is first.stream is first.reads
    assert third.reads is third.stream is second.add
    assert fourth.reads is fourth.stream is third.add
    assert set(first.nodes).isdisjoint(second.nodes)


def test_a_model_without_additions_has_no_spine() -> None:
    with torch.no_grad():
        (captured,), _ = capture_model(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), (token_ids() % 5,), {})
    assert follow_stream(GraphFacts(captured.module.graph, ()), 12) == ()


class AnglesFirst(tiny.Causal):
    """Makes rotary angles between the embedding and the first layer, by a product with a constant on the left."""

    def __init__(self) -> None:
        super().__init__([rotated, rotated])
        self.register_buffer("frequencies", torch.linspace(0, 1, HIDDEN, dtype=torch.float64)[:, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        places = torch.arange(input_ids.shape[1], dtype=x.dtype)
        angles = (self.frequencies @ places[None]).T.cos()
        for layer in self.layers:
            x = rotated(layer, x, angles)
        return self.head(self.norm(x))


def rotated(layer: Layer, x: Tensor, angles: Tensor | float = 1.0) -> Tensor:
    x = x + layer.mix(x * angles)
    return x + layer.ffn(layer.norm(x))


def test_angles_made_after_the_embedding_do_not_hide_the_first_layer() -> None:
    model = AnglesFirst()
    randomise(model, 0)
    blocks = TracedModel(model).graph(token_ids()).blocks
    assert [block.name for block in blocks.mixers] == ["layers.0.mix", "layers.1.mix"]
    assert [block.name for block in blocks.ffns] == ["layers.0.ffn", "layers.1.ffn"]
