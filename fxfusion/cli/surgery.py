"""The parallel form of the demo's model in plain modules, and a change that a comparison must see.

Private to the demo and tied to the module names of the reference model. Nothing here uses the compiler,
so the parallel form is an independent witness of what the compiler makes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SumOfFfns(nn.Module):
    """`F1(n1(x)) + F2(n2(x)) + ...`, every branch on the same input `x: [..., hidden]`."""

    def __init__(self, norms: Sequence[nn.Module], ffns: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms, self.ffns = nn.ModuleList(norms), nn.ModuleList(ffns)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            total = total + ffn(norm(x))
        return total


class Nothing(nn.Module):
    """An FFN that is computed elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def parallel_form(model: nn.Module, groups: Sequence[Sequence[int]], norm: str) -> nn.Module:
    """A copy of the model whose groups of layers read one input, in plain modules, for eager mode.

    `norm`: `"fold"` gives every member its own norm, `"last"` the norm of the group's last member.
    """
    copied = copy.deepcopy(model)
    layers = layers_of(copied)
    for group in groups:
        members = [layers[number] for number in group]
        own = [member.get_submodule("post_attention_layernorm") for member in members]
        norms = own if norm == "fold" else [own[-1]] * len(own)
        together = SumOfFfns(norms, [member.get_submodule("mlp") for member in members])
        for member in members:
            member.post_attention_layernorm, member.mlp = nn.Identity(), Nothing()
        members[0].mlp = together
    return copied


@contextmanager
def one_weight_changed(model: nn.Module, layer: int) -> Iterator[None]:
    """Inside, one single weight of one FFN is off by the largest weight of its matrix."""
    weight = layers_of(model)[layer].get_parameter("mlp.down_proj.weight")
    with torch.no_grad():
        saved = weight[0, 0].clone()
        weight[0, 0] += weight.abs().max()
        try:
            yield
        finally:
            weight[0, 0] = saved


def relative_error(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    first, second = one.detach().double(), other.detach().double()
    return float((first - second).abs().max() / first.abs().max())
