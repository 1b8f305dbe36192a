"""attention_sites: the modules that hold the attention, and those that serve nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxfusion.errors import SurgeryError
from fxfusion.models.attention_sites import AttentionSite, find_sites, layer_list_path
from fxfusion.models.traced import TracedGraph, TracedModel
from tests.blocks import HIDDEN, Rms, randomise
from tests.fxfusion.models import tiny
from tests.fxfusion.models.odd_decoder import odd_decoder
from tests.fxfusion.models.tiny import Layer, causal, token_ids, traced


def graph_of(*layers: Callable[[Layer, Tensor], Tensor]) -> TracedGraph:
    return TracedModel(causal(*layers)).graph(token_ids())


def sandwich(layer: Layer, x: Tensor) -> Tensor:
    """A norm before, which is a module of the layer's own, and a norm after the attention."""
    x = x + layer.norm(layer.mix(layer.gate(x)))
    return x + layer.ffn(x)


def shared_norm(layer: Layer, x: Tensor) -> Tensor:
    n = layer.norm(x)
    return x + layer.mix(n) + layer.ffn(n)


def test_an_attention_with_its_own_norm_inside() -> None:
    assert find_sites(graph_of(tiny.plain, tiny.plain), [0, 1]) == {
        layer: AttentionSite(layer, (f"layers.{layer}.mix",), ()) for layer in (0, 1)
    }


def test_modules_before_and_after_that_serve_only_it() -> None:
    (site,) = find_sites(graph_of(tiny.plain, sandwich), [1]).values()
    assert site.attention == ("layers.1.mix",)
    assert set(site.others) == {"layers.1.norm", "layers.1.gate"}


def test_a_norm_that_the_ffn_shares_stays() -> None:
    assert find_sites(graph_of(shared_norm, tiny.plain), [0])[0] == AttentionSite(0, ("layers.0.mix",), ())


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2"])
def test_families(name: str) -> None:
    family, _, _, graph = traced(name)
    path = f"{family.layers}.2"
    assert layer_list_path(graph) == family.layers
    site = find_sites(graph, [2])[2]
    assert site.attention == (f"{path}.{family.mixers[0]}",)
    assert site.others == tuple(f"{path}.{norm}" for norm in family.norms)


def test_two_attentions_in_one_sum_go_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two, self.ffn = Rms(HIDDEN), tiny.Mixing(), tiny.Mixing(), tiny.Gated()

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            x = x + (self.one(n) + self.two(n))
            return x + self.ffn(x)

    model = causal(tiny.plain, tiny.plain)
    model.layers[1] = Two()
    randomise(model, 0)
    site = find_sites(TracedModel(model).graph(token_ids()), [1])[1]
    assert site == AttentionSite(1, ("layers.1.one", "layers.1.two"), ("layers.1.norm",))


def test_an_addition_inside_the_attention_module_is_part_of_it() -> None:
    class AddsItself(tiny.Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def adding(layer: Layer, x: Tensor) -> Tensor:
        x = layer.mix(x)
        return x + layer.ffn(layer.norm(x))

    model = causal(adding, adding)
    for layer in model.layers:
        layer.mix = AddsItself()
    randomise(model, 0)
    assert find_sites(TracedModel(model).graph(token_ids()), [1])[1].attention == ("layers.1.mix",)


# --- refusals -----------------------------------------------------------------------------------------


def test_a_layer_without_attention() -> None:
    with pytest.raises(SurgeryError, match="layer 1 has no attention"):
        find_sites(graph_of(tiny.plain, tiny.ffn_only), [1])


def test_a_layer_with_two() -> None:
    with pytest.raises(SurgeryError, match="layer 0 mixes tokens in 2 residual blocks .*layers.0.mix"):
        find_sites(graph_of(tiny.two_mixers, tiny.plain), [0])


def odd_graph(form: str) -> TracedGraph:
    return TracedModel(odd_decoder(form=form)).graph(torch.randint(0, 97, (2, 6)))


def test_attention_that_is_no_module_of_its_own() -> None:
    with pytest.raises(SurgeryError, match="the attention of layer 2 is no module of its own"):
        find_sites(odd_graph("inline"), [2])


def test_attention_that_others_read() -> None:
    with pytest.raises(SurgeryError, match=r"layer 2 \(blocks.2.mix\) computes something that other parts .* read"):
        find_sites(odd_graph("shared"), [2])


def test_layers_in_two_lists() -> None:
    class TwoLists(tiny.Causal):
        def __init__(self) -> None:
            super().__init__([tiny.plain, tiny.plain])
            self.more = nn.ModuleList([Layer(tiny.plain), Layer(tiny.plain)])

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for layer in (*self.layers, *self.more):
                x = layer(x)
            return self.head(self.norm(x))

    model = TwoLists()
    randomise(model, 0)
    with pytest.raises(SurgeryError, match="in no single list of modules: layers.0.mix"):
        find_sites(TracedModel(model).graph(token_ids()), [0])
