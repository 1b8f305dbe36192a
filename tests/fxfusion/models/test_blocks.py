from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion.compiler.capture import capture_model
from fxfusion.errors import CaptureError
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.models.blocks import Addition, follow_stream
from fxfusion.models.traced import TracedGraph, TracedModel
from tests.blocks import HIDDEN, randomise
from tests.end_to_end.families import first_tensor, layers_of
from tests.fxfusion.models import tiny
from tests.fxfusion.models.tiny import FAMILIES, Layer, causal, token_ids, traced

FUSABLE = {"llama": 4, "gpt2": 4, "opt": 4, "gemma2": 4, "olmo2": 4}
SUMMED_FIRST = ("gpt_neox", "falcon")  # parallel: attention and FFN are added up, then to the stream


def graph_of(*layers: Callable[..., Tensor], scale: float = 1.0) -> TracedGraph:
    return TracedModel(causal(*layers, scale=scale)).graph(token_ids())


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first input and the output of a module's next call."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.extend((args[0] if args else kwargs["hidden_states"], first_tensor(output)))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_one_mixer_with_its_name(name: str) -> None:
    family, model, _, graph = traced(name)
    assert [block.layer for block in graph.blocks.mixers] == [0, 1, 2, 3]
    assert [block.name for block in graph.blocks.mixers] == [
        f"{family.layers}.{layer}.{family.mixers[0]}" for layer in range(4)
    ]
    assert [block.layer for block in graph.blocks.ffns] == list(range(FUSABLE.get(name, 0)))
    assert [block.name for block in graph.blocks.layers] == [f"{family.layers}.{layer}" for layer in range(4)]
    assert {block.kind for block in graph.blocks.mixers_of([1, 2])} == {"mixer"}
    assert [block.layer for block in graph.blocks.mixers_of([2, 1, 7])] == [1, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_goes_from_the_input_to_the_output_of_its_module(name: str) -> None:
    family, model, ids, graph = traced(name)
    blocks = graph.blocks.layers
    run = graph.run(ids, keep=[node for block in blocks for node in (block.stream, block.after)])
    for block in blocks:
        with recorded(layers_of(model, family)[block.layer]) as seen, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        assert torch.equal(run[block.stream], seen[0]) and torch.equal(run[block.after], seen[1])
        assert not torch.equal(*seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_branches_add_up_to_the_contribution(name: str) -> None:
    _, _, ids, graph = traced(name)
    for block in (*graph.blocks.mixers, *graph.blocks.ffns, *graph.blocks.layers):
        assert len(block.branches) == (2 if block.kind == "layer" and name not in SUMMED_FIRST else 1)
        run = graph.run(ids, keep=[*block.branches, block.before, block.after])
        total = sum((run[branch].flatten() for branch in block.branches), torch.zeros(()))
        difference = run[block.after].flatten() - run[block.before].flatten()
        limit = 1e-12 if run[block.after].dtype is torch.float64 else 1e-5
        assert float((total - difference).abs().max() / difference.abs().max()) < limit
        assert float(difference.abs().max()) > 1e-3


def test_a_parallel_mixer_is_told_from_the_ffn_beside_it() -> None:
    _, model, ids, graph = traced("gpt_neox")
    block = graph.blocks.mixers[2]
    layer = model.get_submodule("gpt_neox.layers.2")
    run = graph.run(ids, keep=[block.stream, block.before, block.after])
    with recorded(layer.attention) as attention, recorded(layer.mlp) as mlp, recorded(layer) as whole, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert torch.equal(run[block.before], mlp[1])
    assert torch.equal(run[block.stream], whole[0])
    torch.testing.assert_close(run[block.after] - run[block.before], attention[1])


@pytest.mark.parametrize("form", [tiny.attention_then_ffn, tiny.ffn_then_attention])
def test_parallel_branches_may_be_added_one_after_the_other(form: Callable[..., Tensor]) -> None:
    model = causal(form, tiny.plain, form)
    ids = token_ids()
    graph = TracedModel(model).graph(ids)
    assert [block.layer for block in graph.blocks.mixers] == [0, 1, 2]
    assert [len(block.branches) for block in graph.blocks.layers] == [2, 2, 2]
    for block, whole in zip(graph.blocks.mixers, graph.blocks.layers, strict=True):
        run = graph.run(ids, keep=[whole.stream, block.before, block.after])
        torch.testing.assert_close(
            run[block.after] - run[block.before], model.layers[block.layer].mix(run[whole.stream])
        )


def test_layers_without_attention_are_layers_whether_or_not_their_ffn_can_fuse() -> None:
    forms = (tiny.plain, tiny.ffn_only, tiny.output_tanh_only, tiny.attention_only, tiny.output_tanh_only)
    graph = graph_of(*forms)
    assert [block.layer for block in graph.blocks.layers] == [0, 1, 2, 3, 4]
    assert [block.layer for block in graph.blocks.mixers] == [0, 3]
    assert [block.layer for block in graph.blocks.ffns] == [0, 1]
    assert [len(block.branches) for block in graph.blocks.layers] == [2, 1, 1, 1, 1]


def test_an_addition_inside_a_mixer_is_not_where_it_ends() -> None:
    model = causal(tiny.inner_addition, tiny.inner_addition)
    ids = token_ids()
    graph = TracedModel(model).graph(ids)
    for block in graph.blocks.mixers:
        assert block.before is block.stream
        run = graph.run(ids, keep=[block.before, block.after])
        layer = model.layers[block.layer]
        x = run[block.before]
        expected = x + layer.gate(torch.tanh(layer.mix(x) + layer.scale * x))
        torch.testing.assert_close(run[block.after], expected)


def test_two_mixers_of_one_layer_are_two_blocks() -> None:
    blocks = graph_of(tiny.two_mixers, tiny.plain).blocks
    assert [block.layer for block in blocks.mixers] == [0, 0, 1]
    assert len(blocks.mixers_of([0])) == 2
    assert [len(block.branches) for block in blocks.layers] == [3, 2]


def test_a_scaled_parallel_mixer_has_no_branch_of_its_own() -> None:
    model = causal(tiny.scaled_parallel, tiny.plain)
    ids = token_ids()
    graph = TracedModel(model).graph(ids)
    scaled, plain = graph.blocks.mixers
    assert scaled.branches == () and len(plain.branches) == 1
    run = graph.run(ids, keep=[scaled.stream, scaled.before, scaled.after])
    layer, x = model.layers[0], run[scaled.stream]
    torch.testing.assert_close(run[scaled.before], layer.ffn(layer.norm(x)))
    torch.testing.assert_close(run[scaled.after] - run[scaled.before], layer.mix(x))


def test_a_layer_ends_after_what_it_does_to_the_sum() -> None:
    model = causal(tiny.scaled_output, tiny.scaled_output)
    ids = token_ids()
    graph = TracedModel(model).graph(ids)
    first, last = graph.blocks.layers
    run = graph.run(ids, keep=[first.stream, first.after, last.stream, last.after])
    assert first.after is last.stream
    torch.testing.assert_close(run[first.after], model.layers[0](run[first.stream]))
    torch.testing.assert_close(run[last.after], model.layers[1](run[last.stream]))
    assert first.branches == last.branches == ()


def test_a_stream_may_be_reshaped_within_a_layer() -> None:
    model = causal(tiny.flat_ffn, tiny.flat_ffn)
    ids = token_ids()
    graph = TracedModel(model).graph(ids)
    for block in graph.blocks.layers:
        run = graph.run(ids, keep=[block.stream, block.after, *block.branches])
        assert run[block.after].shape == (2, 6, 8)
        torch.testing.assert_close(run[block.after], model.layers[block.layer](run[block.stream]))
        first, second = (run[branch] for branch in block.branches)
        total = run[block.stream] + first + second.view(2, 6, 8)
        torch.testing.assert_close(run[block.after], total)


def test_a_scaled_embedding_is_where_the_stream_begins() -> None:
    model = causal(tiny.plain, scale=3.0)
    ids = token_ids()
    graph = TracedModel(model).graph(ids)
    stream = graph.blocks.layers[0].stream
    torch.testing.assert_close(graph.run(ids, keep=[stream])[stream], model.embed(ids) * 3.0)


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(CaptureError, match="no residual blocks"):
        TracedModel(causal()).graph(token_ids())


def test_a_block_outside_numbered_layers_is_an_error() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = causal(tiny.plain)
            self.only = self.inner.layers[0]
            del self.inner.layers

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner.head(self.inner.norm(self.only(self.inner.embed(input_ids))))

    with pytest.raises(CaptureError, match="belongs to no numbered layer"):
        TracedModel(Single().eval()).graph(token_ids())


# --- the stream from its last addition to the embedding ---------------------------------------------


def spine_of(*layers: Callable[[Layer, Tensor], Tensor], scale: float = 1.0) -> tuple[Addition, ...]:
    ids = token_ids()
    with torch.no_grad():
        (captured,), _ = capture_model(causal(*layers, scale=scale), (ids,), {})
    return follow_stream(GraphFacts(captured.module.graph, captured.weights), ids.numel())


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
