from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxfusion.compiler.pipeline import analyse
from fxfusion.errors import CaptureError, OptionError
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import Resumption, TracedGraph, TracedModel, evaluating, model_inputs
from fxfusion.plan.policy import FusionPolicy
from tests.end_to_end.families import Family, layers_of
from tests.fxfusion.models import tiny
from tests.fxfusion.models.tiny import FAMILIES, Causal, causal, family_model, token_ids, traced, traced_family

HALF_LAYERS = ((0,), (3,), (1, 2), (0, 1, 2, 3))


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def same(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    stream = args[0] if args else kwargs["hidden_states"]
    return stream if isinstance(output, Tensor) else type(output)((stream, *output[1:]))


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


def without_attention(family: Family, model: nn.Module, layers: Iterable[int], **inputs: Any) -> Tensor:
    """The model's logits with the output of some attention modules set to zero. Knows nothing of graphs."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(layers_of(model, family)[layer].get_submodule(family.mixers[0]), tiny.zero))
        return logits(model, **inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_computes_what_the_model_does(name: str) -> None:
    _, model, ids, graph = traced(name)
    assert torch.equal(graph.run(ids, keep=[graph.logits])[graph.logits], logits(model, input_ids=ids))
    other = ids.flip(0)
    found = graph.run(other, keep=[graph.logits])[graph.logits]
    assert torch.equal(found, logits(model, input_ids=other))
    assert not torch.equal(found, logits(model, input_ids=ids))


@pytest.mark.parametrize("layers", HALF_LAYERS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_removed_mixers_give_the_model_with_its_attention_zeroed(name: str, layers: Sequence[int]) -> None:
    family, model, ids, graph = traced(name)
    found = graph.run(ids, keep=[graph.logits], removed=graph.blocks.mixers_of(layers))[graph.logits]
    expected = without_attention(family, model, layers, input_ids=ids)
    assert torch.allclose(found, expected, rtol=0, atol=limit(expected))
    assert not torch.allclose(found, logits(model, input_ids=ids), rtol=0, atol=1e3 * limit(expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_removed_layer_hands_its_input_on(name: str) -> None:
    family, model, ids, graph = traced(name)
    for block in graph.blocks.layers:
        with hooked(layers_of(model, family)[block.layer], same):
            expected = logits(model, input_ids=ids)
        found = graph.run(ids, keep=[graph.logits], removed=[block])[graph.logits]
        assert torch.allclose(found, expected, rtol=0, atol=limit(expected))
        assert not torch.equal(found, logits(model, input_ids=ids))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_removed_ffn_gives_the_model_with_its_ffn_zeroed(name: str) -> None:
    family, model, ids, graph = traced(name)
    for block in graph.blocks.ffns:
        with hooked(model.get_submodule(block.name), tiny.zero):
            expected = logits(model, input_ids=ids)
        found = graph.run(ids, keep=[graph.logits], removed=[block])[graph.logits]
        assert torch.allclose(found, expected, rtol=0, atol=limit(expected))


def limit(logits: Tensor) -> float:
    """Rounding of a few operations: `0 + x` may be spelled otherwise."""
    return 64 * torch.finfo(logits.dtype).eps * float(logits.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_that_reuses_another_is_bit_equal(name: str) -> None:
    _, _, ids, graph = traced(name)
    for blocks in (graph.blocks.mixers, graph.blocks.ffns, graph.blocks.layers):
        base = graph.run(ids, keep=[graph.logits, *(block.before for block in blocks)])
        for block in blocks:
            keep = [graph.logits, *(other.after for other in blocks)]
            whole = graph.run(ids, keep, removed=[block])
            reused = graph.run(ids, keep, removed=[block], base=base)
            assert all(torch.equal(whole[node], reused[node]) for node in keep)
            assert not torch.equal(whole[graph.logits], base[graph.logits])


def test_a_base_may_lack_blocks_itself() -> None:
    _, _, ids, graph = traced("llama")
    first, second, third, last = graph.blocks.mixers
    base = graph.run(ids, keep=[second.before, last.before], removed=[third])
    reused = graph.run(ids, keep=[graph.logits], removed=[last, second], base=base)
    assert reused.removed == {second, third, last}
    whole = graph.run(ids, keep=[graph.logits], removed=[second, third, last])
    assert torch.equal(reused[graph.logits], whole[graph.logits])
    assert torch.equal(graph.run(ids, keep=[graph.logits], base=reused)[graph.logits], whole[graph.logits])


def test_reuse_computes_only_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, ids, graph = traced("llama")
    blocks = graph.blocks.mixers
    counts = watch(monkeypatch)
    base = graph.run(ids, keep=[block.before for block in blocks])
    counts.clear()
    shares = []
    for block in blocks:
        graph.run(ids, keep=[graph.logits], removed=[block], base=base)
        shares.append(len(counts))
        counts.clear()
    graph.run(ids, keep=[graph.logits], removed=[blocks[-1]])
    assert shares == sorted(shares, reverse=True) and shares[-1] < len(counts) / 4
    counts.clear()
    graph.run(ids, keep=[blocks[0].after])
    assert len(counts) < shares[0] / 2  # stops after the last value that is wanted


def test_values_are_freed_after_their_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, ids, graph = traced("llama")
    made = watch(monkeypatch)
    alive_at_once = 0

    def note(alive: int) -> None:
        nonlocal alive_at_once
        alive_at_once = max(alive_at_once, alive)

    made.on_new = note
    run = graph.run(ids, keep=[graph.logits])
    gc.collect()
    kept = {id(value) for value in run.values.values()}
    assert {id(value) for value in made.alive()} <= kept
    assert 3 < alive_at_once < 25 < len(made) / 5


class Watched(list[Any]):
    """Weak references to every tensor that a run makes."""

    on_new: Any = None

    def alive(self) -> list[Tensor]:
        return [value for reference in self if (value := reference()) is not None]


def watch(monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched()
    original = fx.Interpreter.run_node

    def run_node(self: fx.Interpreter, node: fx.Node) -> Any:
        result = original(self, node)
        if isinstance(result, Tensor) and not isinstance(result, nn.Parameter):
            made.append(weakref.ref(result))
            if made.on_new is not None:
                made.on_new(len(made.alive()))
        return result

    monkeypatch.setattr(fx.Interpreter, "run_node", run_node)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_padding_is_passed_on(name: str) -> None:
    family, model = family_model(name)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    graph = traced_family(name).graph(batch)
    seen = mask != 0  # what stands at padding is not defined
    found = graph.run(batch, keep=[graph.logits])[graph.logits]
    assert torch.equal(found[seen], logits(model, input_ids=ids, attention_mask=mask)[seen])
    assert not torch.equal(found[seen], logits(model, input_ids=ids)[seen])
    other, seen = batch | {"attention_mask": mask.flip(0)}, seen.flip(0)
    found = graph.run(other, keep=[graph.logits], removed=graph.blocks.mixers_of([1]))[graph.logits]
    expected = without_attention(family, model, [1], input_ids=ids, attention_mask=mask.flip(0))
    assert torch.allclose(found[seen], expected[seen], rtol=0, atol=limit(expected[seen]))


def test_each_shape_is_captured_once() -> None:
    model = TracedModel(causal(tiny.plain))
    graph = model.graph(token_ids(2, 6))
    assert model.graph(token_ids(2, 6, seed=5)) is graph
    assert model.graph({"input_ids": token_ids(2, 6)}) is graph
    assert model.graph({"input_ids": token_ids(2, 6), "labels": token_ids(2, 6)}) is graph
    other = model.graph(token_ids(3, 6))
    assert other is not graph
    with pytest.raises(ValueError, match="belongs to another graph"):
        other.run(token_ids(3, 6), keep=[other.logits], removed=graph.blocks.mixers)
    with pytest.raises(ValueError, match="belongs to another graph"):
        other.run(token_ids(3, 6), keep=[graph.logits])
    base = graph.run(token_ids(), keep=[graph.logits])
    with pytest.raises(ValueError, match="belongs to another graph"):
        other.run(token_ids(3, 6), keep=[other.logits], base=base)


# --- attention left out of the graph ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_a_graph_without_mixers_is_the_model_without_them(name: str) -> None:
    family, model, ids, graph = traced(name)
    without = graph.without([1, 2])
    expected = without_attention(family, model, [1, 2], input_ids=ids)
    found = without.run(ids, keep=[without.logits])[without.logits]
    assert torch.allclose(found, expected, rtol=0, atol=limit(expected))
    assert [block.layer for block in without.blocks.mixers] == [0, 3]
    assert [block.layer for block in without.blocks.layers] == [0, 1, 2, 3]
    assert [block.layer for block in graph.blocks.mixers] == [0, 1, 2, 3]  # the graph itself is as it was
    fusable = {"llama": [0, 1, 2, 3], "gpt_neox": [1, 2], "gemma2": [0, 1, 2, 3]}
    assert [block.layer for block in without.blocks.ffns] == fusable[name]


def test_a_traced_model_can_leave_attention_out_of_all_its_graphs() -> None:
    model = causal(tiny.plain, tiny.parallel, tiny.plain)
    intact, dropped = TracedModel(model), TracedModel(model, dropped_attention=[1, 1])
    for ids in (token_ids(), token_ids(1, 4)):
        graph, without = intact.graph(ids), dropped.graph(ids)
        removed = graph.run(ids, keep=[graph.logits], removed=graph.blocks.mixers_of([1]))
        assert torch.equal(without.run(ids, keep=[without.logits])[without.logits], removed[graph.logits])
    with pytest.raises(OptionError, match=r"no attention to drop in layers \[3, 7\]; it is in layers \[0, 1, 2\]"):
        TracedModel(model, dropped_attention=[1, 3, 7]).graph(token_ids())


def test_a_traced_model_lends_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = causal(tiny.plain, tiny.plain, tiny.plain), token_ids()
    intact = TracedModel(model)
    graph = intact.graph(ids)
    monkeypatch.setattr("fxfusion.models.traced.capture_model", None)
    assert TracedModel(intact).graph(ids) is graph and TracedModel(intact).model is model
    without = TracedModel(TracedModel(intact, [2]), [0, 2])
    assert without.dropped_attention == (0, 2)
    assert [block.layer for block in without.graph(ids).blocks.mixers] == [1]
    assert [block.layer for block in graph.blocks.mixers] == [0, 1, 2]


def test_a_compiled_model_is_traced_like_its_own() -> None:
    model, ids = causal(tiny.plain), token_ids()
    graph = TracedModel(torch.compile(model, backend="eager")).graph(ids)  # type: ignore[arg-type]
    assert [block.name for block in graph.blocks.mixers] == ["layers.0.mix"]
    assert torch.equal(graph.run(ids, keep=[graph.logits])[graph.logits], model(ids))


def test_all_attention_may_be_left_out() -> None:
    without = TracedModel(causal(tiny.plain, tiny.plain), dropped_attention=[0, 1]).graph(token_ids())
    assert without.blocks.mixers == () and len(without.blocks.ffns) == 2


# --- removal of nested blocks, effects, modes ---------------------------------------------------------


def removal(graph: TracedGraph, ids: Tensor, *blocks: ResidualBlock) -> Tensor:
    return graph.run(ids, keep=[graph.logits], removed=blocks)[graph.logits]


def test_a_layer_removed_together_with_its_parts_is_gone_whole() -> None:
    model, ids = causal(tiny.plain, tiny.plain, tiny.plain), token_ids()
    graph = TracedModel(model).graph(ids)
    layer, ffn, mixer = graph.blocks.layers[1], graph.blocks.ffns[1], graph.blocks.mixers[1]
    assert layer.after is ffn.after
    alone = removal(graph, ids, layer)
    assert torch.equal(removal(graph, ids, ffn, layer, mixer), alone)
    both = removal(graph, ids, ffn, mixer)
    assert torch.equal(both, alone) and not torch.equal(removal(graph, ids, ffn), alone)


def by_hand(model: Causal, ids: Tensor, *, mixer: int | None = None) -> list[Tensor]:
    """The stream before each addition and at the end, without the mixer of one layer. For plain layers."""
    x = model.embed(ids)
    streams = []
    for number, layer in enumerate(model.layers):
        streams.append(x)
        x = x if number == mixer else x + layer.mix(x)
        streams.append(x)
        x = x + layer.ffn(layer.norm(x))
    return [*streams, x]


def kept_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The state of a model of three layers without the middle one."""
    return [(name, value) for name, value in model.state_dict().items() if not name.startswith("layers.1.")]


@torch.no_grad()
def test_a_stream_that_is_written_in_place_is_kept_as_it_was() -> None:
    model, ids = causal(tiny.in_place, tiny.in_place, tiny.in_place), token_ids()
    graph = TracedModel(model).graph(ids)
    nodes = [block.before for block in graph.blocks.mixers]
    base = graph.run(ids, keep=[*nodes, graph.logits])
    expected = by_hand(model, ids)
    for node, stream in zip(nodes, expected[::2], strict=False):
        torch.testing.assert_close(base[node], stream)
    torch.testing.assert_close(base[graph.logits], model(ids))
    layer = graph.blocks.layers[1]
    without = Causal([tiny.plain, tiny.plain]).double()
    without.load_state_dict({name.replace("layers.2", "layers.1"): value for name, value in kept_state(model)})
    torch.testing.assert_close(removal(graph, ids, layer), without(ids))
    for number, block in enumerate(graph.blocks.mixers):
        run = graph.run(ids, keep=[graph.logits, *nodes], removed=[block], base=base)
        expected = by_hand(model, ids, mixer=number)
        torch.testing.assert_close(run[graph.logits], model.head(model.norm(expected[-1])))
        for node, stream in zip(nodes, expected[::2], strict=False):
            torch.testing.assert_close(run[node], stream)


@torch.no_grad()
def test_a_buffer_that_the_model_updates_stays_as_it_is() -> None:
    model, ids = causal(tiny.counting, tiny.counting), token_ids()
    for layer in model.layers:
        layer.calls.fill_(2.0)
    graph = TracedModel(model).graph(ids)
    first = graph.run(ids, keep=[graph.logits])[graph.logits]
    assert torch.equal(graph.run(ids, keep=[graph.logits])[graph.logits], first)
    assert [float(layer.calls) for layer in model.layers] == [2.0, 2.0]
    torch.testing.assert_close(model(ids), first)
    assert [float(layer.calls) for layer in model.layers] == [3.0, 3.0]


@torch.no_grad()
def test_a_mode_switched_between_blocks_is_kept() -> None:
    model, ids = causal(tiny.with_autocast, tiny.with_autocast), token_ids()
    graph = TracedModel(model).graph(ids)
    base = graph.run(ids, keep=[graph.blocks.mixers[1].before, graph.logits])
    torch.testing.assert_close(base[graph.logits], model(ids))
    for block in graph.blocks.mixers:
        whole = graph.run(ids, keep=[graph.logits], removed=[block])
        reused = graph.run(ids, keep=[graph.logits], removed=[block], base=base)
        assert torch.equal(whole[graph.logits], reused[graph.logits])
        assert reused.removed == {block}
    assert not torch.is_autocast_enabled("cpu")


def test_a_model_in_training_is_run_as_in_eval_and_left_in_training() -> None:
    model = causal(tiny.plain)
    model.head = nn.Sequential(nn.Dropout(0.9), model.head).double()
    ids = token_ids()
    expected = model.eval()(ids)
    model.train()
    model.norm.eval()
    graph = TracedModel(model).graph(ids)
    assert torch.equal(graph.run(ids, keep=[graph.logits])[graph.logits], expected)
    assert model.training and model.head.training and not model.norm.training
    with evaluating(model):
        assert not model.head[0].training
    assert model.head[0].training


# --- what cannot be captured --------------------------------------------------------------------------


def test_a_model_of_several_graphs_is_an_error() -> None:
    with pytest.raises(CaptureError, match="must be captured as one graph.*breaks cut the model into"):
        TracedModel(causal(tiny.breaking, tiny.breaking)).graph(token_ids())


def test_a_model_without_logits_is_an_error() -> None:
    model = causal(tiny.plain)
    model.head = nn.Flatten().double()
    with pytest.raises(CaptureError, match=r"no logits \[batch, seq, vocabulary\] for token ids \[2, 6\]"):
        TracedModel(model).graph(token_ids())


@pytest.mark.parametrize("batch", [{"labels": token_ids()}, token_ids()[0], {"input_ids": [1, 2]}])
def test_a_batch_without_token_ids_is_an_error(batch: Any) -> None:
    with pytest.raises(CaptureError, match=r"must hold `input_ids` \[batch, seq\]"):
        TracedModel(causal(tiny.plain)).graph(batch)


def test_a_model_that_does_not_read_the_token_ids_is_an_error() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = causal(tiny.plain)

        def forward(self, input_ids: Tensor) -> Tensor:
            stream = self.inner.embed.weight[:6].expand(2, 6, -1)
            return self.inner.head(self.inner.norm(self.inner.layers[0](stream)))

    with pytest.raises(CaptureError, match="does not read the token ids"):
        TracedModel(Deaf().eval()).graph(token_ids())


def test_inputs_lose_labels_and_gain_no_cache() -> None:
    _, model = family_model("llama")
    ids = token_ids()
    given = {"input_ids": ids, "labels": ids}
    assert model_inputs(model, given).keys() == {"input_ids", "use_cache"}
    assert model_inputs(model, given)["use_cache"] is False
    assert model_inputs(causal(tiny.plain), ids).keys() == {"input_ids"}
    assert given.keys() == {"input_ids", "labels"}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_views_around_a_mixer_that_is_left_out_do_not_break_chains(name: str) -> None:
    """Where each layer folds batch and sequence into one axis and back, these views cancel once attention is gone."""
    _, model, ids, _ = traced(name)
    graph = TracedModel(model, [1, 2, 3]).graph(ids)
    (chain,) = analyse(graph.captured, FusionPolicy()).chains
    assert len(chain.members) == 4
    intact = TracedModel(model).graph(ids)
    removed = intact.blocks.mixers_of([1, 2, 3])
    wanted = intact.run(ids, keep=[intact.logits], removed=removed)[intact.logits]
    assert torch.allclose(graph.run(ids, keep=[graph.logits])[graph.logits], wanted)


# --- what running a graph in parts must respect -----------------------------------------------------


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
