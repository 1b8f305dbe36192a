from __future__ import annotations

import operator

import torch
from torch import fx

from fxfusion.models.resumption import Resumption


class Chain:
    """A graph written by hand: `chain.shared` and so on are its nodes."""

    def __init__(self) -> None:
        graph = self.graph = fx.Graph()
        self.x = graph.placeholder("x")
        self.buffer = graph.placeholder("buffer")
        self.shared = graph.call_function(torch.sin, (self.x,))
        self.private = graph.call_function(torch.cos, (self.x,))
        self.block = graph.call_function(torch.add, (self.private, self.shared))
        self.fresh = graph.call_function(torch.exp, (self.block,))
        self.view = graph.call_method("view", (self.fresh, -1))
        self.other_view = graph.call_method("reshape", (self.fresh, 2, -1))
        self.write = graph.call_function(operator.iadd, (self.view, self.shared))
        self.reader = graph.call_function(torch.neg, (self.other_view,))
        self.update = graph.call_method("add_", (self.buffer, 1))
        self.last = graph.call_function(torch.mul, (self.reader, self.shared))
        self.output = graph.output((self.last,))

    @property
    def effects(self) -> Resumption:
        return Resumption(self.graph, self.block)


def test_shared_values_come_from_before_the_first_block() -> None:
    chain = Chain()
    assert chain.effects.shared == (chain.shared,)


def test_a_written_value_is_written_under_all_its_names() -> None:
    chain = Chain()
    effects = chain.effects
    for node in (chain.fresh, chain.view, chain.other_view, chain.write):
        assert effects.is_written(node) and list(effects.writers(node)) == [chain.write]
    assert list(effects.writers(chain.buffer)) == [chain.update] and effects.is_written(chain.buffer)
    for node in (chain.x, chain.shared, chain.block, chain.reader, chain.last):
        assert not effects.is_written(node) and not effects.writers(node)


def test_readers_of_a_written_value_depend_on_what_was_written() -> None:
    chain = Chain()
    downstream = chain.effects.downstream(chain.write)
    assert {chain.write, chain.view, chain.other_view, chain.reader, chain.last} <= downstream
    assert downstream.isdisjoint({chain.x, chain.shared, chain.block, chain.update})
    assert chain.effects.downstream(chain.reader) == {chain.reader, chain.last, chain.output}


def test_runs_can_resume_unless_something_acts_behind_the_first_block() -> None:
    chain = Chain()
    assert chain.effects.can_resume and chain.effects.side_effects == ()
    with chain.graph.inserting_before(chain.private):
        early = chain.graph.call_function(torch.set_grad_enabled, (False,))
    effects = chain.effects
    assert effects.can_resume and effects.side_effects == (early,)
    with chain.graph.inserting_before(chain.last):
        late = chain.graph.call_function(torch.set_grad_enabled, (True,))
    effects = chain.effects
    assert not effects.can_resume and effects.side_effects == (early, late)
