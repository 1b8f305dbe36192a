"""What operations do beside returning a value: by schema, by lists that were run, and denied where nothing is known."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfusion.graph import effects, ops
from fxfusion.graph.effects import (
    GraphEffects,
    effect_of,
    forget_effects,
    graph_effects,
    is_pure,
    records_gradients,
    shares_memory_with,
)
from tests.fxfusion.graph.test_ops import ATEN, call

library = torch.library.Library("fxeffects", "DEF")
library.define("note(Tensor x) -> Tensor")
library.define("tick() -> ()")


def writes(node: fx.Node) -> list[str]:
    return [written.name for written in effect_of(node).writes]


def many(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node whose arguments `a`, `b`, `c` are placeholders of their own, in lists too."""
    graph = fx.Graph()
    places = {name: graph.placeholder(name) for name in "abc"}
    swap = lambda value: places.get(value, value) if isinstance(value, str) else value  # noqa: E731
    args, kwargs = (fx.node.map_aggregate(each, swap) for each in (args, kwargs))
    return graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)


@pytest.mark.parametrize(
    ("node", "written"),
    [
        (many(torch._foreach_add_, ["a", "b"], ["c", "c"]), ["a", "b"]),
        (many(torch._foreach_mul_, ["a"], 2), ["a"]),
        (many(ATEN._foreach_add_.List, ["a"], ["b"]), ["a"]),
        (many(ATEN.add_, "a", "b"), ["a"]),
        (many(ATEN.add.out, "a", "b", out="c"), ["c"]),
        (many(ATEN.add, "a", "b", out="c"), ["c"]),
        (many(torch.add, "a", "b", out="c"), ["c"]),
        (many(torch.sort, "a", out=("b", "c")), ["b", "c"]),
        (many(operator.iadd, "a", "b"), ["a"]),
        (many(operator.setitem, "a", 0, "b"), ["a"]),
        (many("__setitem__", "a", 0, "b"), ["a"]),
        (many("index_copy_", "a", 0, "b", "c"), ["a"]),
        (many("copy_", "a", "b"), ["a"]),
        (many(torch.relu_, "a"), ["a"]),
        (many("requires_grad_", "a"), ["a"]),
        (many("retain_grad", "a"), ["a"]),
        (many("record_stream", "a", 1), ["a"]),
        (many(F.batch_norm, "a", "b", "c", None, None, True), ["b", "c"]),
        (many(F.batch_norm, "a", "b", "c"), []),
        (many(ATEN.native_batch_norm.default, "a", None, None, "b", "c", True, 0.1, 1e-5), ["b", "c"]),
        (many(F.instance_norm, "a", "b", "c"), ["b", "c"]),
        (many(F.instance_norm, "a", "b", "c", use_input_stats=False), []),
        (many(F.embedding, "a", "b", max_norm=1.0), ["b"]),
        (many(F.embedding, "a", "b"), []),
        (many(F.silu, "a", inplace="b"), ["a"]),
        (many("__imul__", "a", 2), ["a"]),
        (many(F.relu, "a", inplace=True), ["a"]),
        (many(F.relu, "a", True), ["a"]),
        (many(F.hardswish, "a", True), ["a"]),
        (many(F.threshold, "a", 0.1, 0.0, True), ["a"]),
        (many(F.dropout, "a", 0.0, True, True), ["a"]),
        (many(F.dropout, "a", 0.5, False, True), []),
        (many(F.relu, "a", False), []),
        (many("__invert__", "a"), []),
        (many(ATEN.add.Tensor, "a", "b"), []),
        (many(torch.add, "a", "b"), []),
        (many("__and__", "a", "b"), []),
        (many(torch.einsum, "ij,jk->ik", "a", "b"), []),
    ],
    ids=str,
)
def test_what_is_written(node: fx.Node, written: list[str]) -> None:
    found = effect_of(node)
    assert [each.name for each in found.writes] == written and not found.unknown
    assert is_pure(node) is (not written) and effects.writes_in_place(node) is bool(written)


def stranger(x: Any, *others: Any) -> Any:
    return x


@pytest.mark.parametrize(
    ("node", "switches"),
    [
        (many(stranger, "a", ["b"]), True),
        (many("register_hook", "a", "b"), True),
        (many("register_post_accumulate_grad_hook", "a", "b"), True),
        (many("backward", "a", "b"), True),
        (many("share_memory_", "a", "b"), True),
        (many("wait", "a", "b"), True),
        (many(torch.autograd.grad, "a", "b"), True),
        (many(torch.manual_seed, "a", "b"), True),
        (many(torch.ops.fxeffects.note.default, "a"), False),
        (many(torch.ops.fxeffects.note, "a"), False),
        (many(torch.ops._c10d_functional.all_reduce.default, "a", "sum", "0"), False),
        (many(torch.ops._c10d_functional.wait_tensor.default, "a"), False),
        (many(torch.ops.higher_order.cond, "a", "b"), False),
        (many(torch.ops.higher_order.triton_kernel_wrapper_mutation, kernel_idx=0, kwargs={"x": "a", "y": "b"}), False),
        (many(torch.ops.fxeffects.tick.default), True),
        (many(torch.ops.streams.fork.default, 1, 2), True),
    ],
    ids=str,
)
def test_what_is_not_understood_writes_all_that_it_reads(node: fx.Node, switches: bool) -> None:
    found = effect_of(node)
    assert set(found.writes) == set(node.all_input_nodes)
    assert found.acts and found.draws and found.unknown and not is_pure(node)
    assert found.switches is switches
    assert set(shares_memory_with(node)) == set(node.all_input_nodes)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
        lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
    ],
    ids="grad vjp jvp vmap jacrev hessian".split(),
)
def test_levels_of_functorch_switch_and_write_no_value(transform: Callable[..., Tensor]) -> None:
    """Each primitive that a graph of Dynamo holds, run: the input is as it was, and nothing is unknown."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    x = torch.linspace(0.1, 1.0, 3)
    before = x.clone()
    with torch.no_grad():
        torch.compile(lambda x: transform(torch.sin, x), backend=backend, fullgraph=True)(x)
    assert torch.equal(x, before) and x._version == 0
    nodes = [node for gm in found for node in gm.graph.nodes if ops.op_name(node) in effects.LEVELS]
    assert nodes
    for node in nodes:
        assert effect_of(node).switches and not effect_of(node).writes and not effect_of(node).unknown


def test_methods_of_streams_and_events_are_not_those_of_tensors() -> None:
    """`Event.record`, `Stream.wait_stream` may be named like anything."""
    node = call("to", "x")
    node.args[0].meta["example_value"] = object()
    assert effect_of(node).unknown and effect_of(node).switches
    node.args[0].meta["example_value"] = torch.empty(2)
    assert is_pure(node)


def test_what_acts_without_a_result() -> None:
    for node in (
        call(ATEN._assert_async.msg, "x", ""),
        call(torch._check, "x"),
        call(ATEN.sym_constrain_range.default, "x"),
    ):
        found = effect_of(node)
        assert found.acts and not found.switches and not found.writes and not is_pure(node)
    assert is_pure(call(torch._C._log_api_usage_once, "x"))


@pytest.mark.parametrize(
    ("node", "random"),
    [
        (call(F.dropout, "x", 0.1), True),
        (call(F.dropout, "x", 0.1, training=False), False),
        (call(F.dropout, "x", 0.0, training=True), False),
        (call(torch.dropout, "x", 0.1, True), True),
        (call(torch.dropout, "x", 0.1, False), False),
        (call(ATEN.dropout.default, "x", 0.1, True), True),
        (call(ATEN.native_dropout.default, "x", 0.1, True), True),
        (call(torch.rand_like, "x"), True),
        (call("bernoulli_", "x"), True),
        (call(ATEN.bernoulli.default, "x"), True),
        (call(F.rrelu, "x"), False),
        (call(F.rrelu, "x", training=True), True),
        (call(ATEN.rrelu_with_noise_functional.default, "x", "noise", 0.1, 0.3, False), False),
        (call(ATEN.rrelu_with_noise_functional.default, "x", "noise", 0.1, 0.3, True), True),
        (call(F.gelu, "x"), False),
    ],
    ids=str,
)
def test_randomness(node: fx.Node, random: bool) -> None:
    assert effects.is_random(node) is random
    if random:
        assert not effects.is_pure(node)


def test_mode_switches_and_sub_graphs_are_not_pure() -> None:
    assert effect_of(call(torch._C._set_grad_enabled, False)).switches
    assert not effects.is_pure(call(torch._C._set_grad_enabled, False))
    cond = call(torch.ops.higher_order.cond, "x")
    assert effects.is_higher_order(cond) and not effects.is_pure(cond)


X = lambda: torch.linspace(-1.0, 1.0, 2 * 4 * 8).view(2, 4, 8)  # noqa: E731
IMAGE = lambda: torch.linspace(-1.0, 1.0, 2 * 2 * 8 * 8).view(2, 2, 8, 8)  # noqa: E731
LABELS = lambda: torch.tensor([1, 0])  # noqa: E731
# Every function that is granted, called once. What is not here may not be in the list.
GRANTED: dict[str, tuple[Any, ...]] = (
    dict.fromkeys(
        "celu elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 rrelu selu sigmoid silu softsign tanh "
        "tanhshrink normalize atleast_1d atleast_2d atleast_3d norm".split(),
        (X,),
    )
    | dict.fromkeys("softmax log_softmax softmin glu".split(), (X, -1))
    | dict.fromkeys(
        "binary_cross_entropy_with_logits huber_loss kl_div l1_loss mse_loss smooth_l1_loss".split(), (X, X)
    )
    | dict.fromkeys("max_pool1d adaptive_max_pool1d".split(), (X, 2))
    | dict.fromkeys(
        "max_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate local_response_norm".split(), (IMAGE, 2)
    )
    | dict.fromkeys("adaptive_avg_pool3d adaptive_max_pool3d max_pool3d".split(), (IMAGE, 2))
    | dict.fromkeys("dropout alpha_dropout feature_alpha_dropout dropout2d dropout3d".split(), (IMAGE, 0.5, False))
    | {
        "dropout1d": (X, 0.5, False),
        "affine_grid": (lambda: torch.ones(1, 2, 3), [1, 1, 4, 4]),
        "batch_norm": (X, lambda: torch.zeros(4), lambda: torch.ones(4)),
        "binary_cross_entropy": (lambda: torch.full((3,), 0.3), lambda: torch.ones(3)),
        "block_diag": (lambda: torch.ones(2, 2), lambda: torch.ones(3)),
        "broadcast_tensors": (lambda: torch.ones(2, 1), lambda: torch.ones(3)),
        "cartesian_prod": (lambda: torch.ones(2), lambda: torch.ones(3)),
        "cdist": (X, X),
        "chain_matmul": (lambda: torch.ones(2, 3), lambda: torch.ones(3, 2)),
        "cross_entropy": (lambda: torch.ones(2, 3), LABELS),
        "einsum": ("bth,bsh->bts", X, X),
        "embedding": (LABELS, lambda: torch.ones(3, 4)),
        "fold": (lambda: torch.ones(1, 4, 9), (4, 4), (2, 2)),
        "grid_sample": (IMAGE, lambda: torch.zeros(2, 3, 3, 2)),
        "group_norm": (X, 2),
        "instance_norm": (X, None, None, None, None, True),
        "layer_norm": (X, (8,)),
        "lp_pool1d": (X, 2.0, 2),
        "lp_pool2d": (IMAGE, 2.0, 2),
        "meshgrid": (lambda: torch.ones(2), lambda: torch.ones(3)),
        "multi_head_attention_forward": (
            *(X, X, X, 8, 2, lambda: torch.ones(24, 8), lambda: torch.ones(24), None, None, False, 0.0),
            *(lambda: torch.ones(8, 8), lambda: torch.ones(8)),
        ),
        "nll_loss": (lambda: torch.ones(2, 3), LABELS),
        "pad": (X, (1, 1)),
        "rms_norm": (X, (8,)),
        "split": (X, 2),
        "stft": (lambda: torch.ones(64, dtype=torch.complex64), 16),
        "tensordot": (X, X, 3),
        "threshold": (X, 0.1, 0.0),
        "unfold": (IMAGE, 2),
    }
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(effects.PURE_FUNCTIONS))
def test_a_granted_function_writes_nothing_and_draws_nothing(name: str) -> None:
    function = getattr(F, name, None) or getattr(torch.functional, name)
    arguments = [value() if callable(value) else value for value in GRANTED[name]]
    before = [value.clone() for value in arguments if isinstance(value, Tensor)]
    state = torch.get_rng_state()
    function(*arguments)
    after = [value for value in arguments if isinstance(value, Tensor)]
    assert all(map(torch.equal, before, after)) and torch.equal(state, torch.get_rng_state())
    assert all(value._version == 0 for value in after)
    places = [
        chr(ord("a") + index % 3) if isinstance(value, Tensor) else value for index, value in enumerate(arguments)
    ]
    assert not effect_of(many(function, *places)).unknown


def test_nothing_is_granted_that_does_not_run_here() -> None:
    assert set(GRANTED) == effects.PURE_FUNCTIONS


@pytest.mark.parametrize("name", sorted(effects.PURE_METHODS))
def test_a_granted_method_writes_nothing(name: str) -> None:
    x = X()
    before = x.clone()
    getattr(x, name)(*((1.0,) if name == "new_tensor" else ()))
    assert torch.equal(before, x) and x._version == 0
    assert is_pure(call(name, "x"))


def test_granted_functions_of_python_write_nothing() -> None:
    x = torch.ones(2, 2)
    two = {
        operator.lshift: (1, 2),
        operator.rshift: (4, 1),
        divmod: (7, 2),
        round: (1.5,),
        slice: (1,),
        getattr: (x, "T"),
    }
    one = "abs index inv invert neg not_ pos truth sym_float sym_int sym_not _sym_sqrt float int bool sum len".split()
    for function in effects.PURE_PYTHON:
        name = getattr(function, "__name__", str(function))
        if function in two:
            function(*two[function])
        elif function is torch.Size:
            function([1])
        elif name == "sym_ite":
            function(True, 1, 2)
        elif name in ("sym_sum", "sum", "len"):
            function([1, 2])
        elif name == "getitem":
            function(x, 0)
        elif name == "matmul":
            function(x, x)
        else:
            function(*((3,) if name in one else (3, 2)))
        assert is_pure(call(function, "x"))
    assert torch.equal(x, torch.ones(2, 2)) and x._version == 0
    assert is_pure(call(math.sqrt, "x"))


def traced(body: Callable[[Any, Tensor], Any]) -> tuple[GraphEffects, dict[str, fx.Node]]:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Any:
            return body(self, x)

    graph = fx.Tracer().trace(Module())
    return GraphEffects(graph), {node.name: node for node in graph.nodes}


def test_values_that_may_share_memory_are_one_class() -> None:
    found, nodes = traced(lambda m, x: ((y := x * 2).view(-1).chunk(2)[0].expand_as(x), y.to(torch.int), x + 1))
    assert {node.name for node in found.members(nodes["expand_as"])} == {
        "mul",
        "view",
        "chunk",
        "getitem",
        "expand_as",
        "to",
    }
    assert found.root(nodes["add"]) is nodes["add"] and found.root(nodes["x"]) is nodes["x"]


def test_inputs_that_are_views_of_one_storage_are_one_value() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    base = torch.ones(4)
    x.meta["example_value"], y.meta["example_value"] = base, base[1:]
    write = graph.call_method("add_", (x, 1))
    graph.output((y, write))
    found = GraphEffects(graph)
    assert found.writers_of(y) == (write,)
    y.meta["example_value"] = torch.ones(3)
    assert GraphEffects(graph).writers_of(y) == ()


def test_observable_effects_are_those_that_somebody_outside_sees() -> None:
    def body(m: Any, x: Tensor) -> Any:
        y = x * 2
        y.add_(1)  # made here
        x.view(-1).mul_(2)
        m.w.data.copy_(m.w)
        torch.rand_like(x)
        return y

    found, nodes = traced(body)
    assert [node.name for node in found.observable()] == ["mul_", "copy_", "rand_like"]
    assert found.is_private(nodes["mul"]) and not found.is_private(nodes["x"])


def test_what_records_gradients() -> None:
    def graph_of(*targets: tuple[Any, ...]) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder("x")
        for target, *args in targets:
            graph.call_function(target, tuple(x if arg == "x" else arg for arg in args))
        graph.output(x)
        return graph

    assert not records_gradients(graph_of((torch.sin, "x"), (torch._C._set_grad_enabled, False)))
    assert not records_gradients(graph_of((torch.amp.autocast_mode._enter_autocast, "cpu", None, True, None)))
    assert records_gradients(graph_of((torch._C._set_grad_enabled, True)))
    assert records_gradients(graph_of((torch._C._functorch._grad_increment_nesting,)))
    assert records_gradients(graph_of((torch.autograd.grad, "x", "x")))
    assert records_gradients(graph_of((stranger, "x")))


def test_names_of_switches_from_elsewhere_are_not_believed() -> None:
    def _set_grad_enabled(x: Any) -> None: ...

    assert effect_of(call(_set_grad_enabled, "x")).unknown
    assert ops.op_name(call(_set_grad_enabled, "x")) == "_set_grad_enabled"


def test_effects_are_read_once_while_the_graph_stays_as_it_is() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    z = graph.call_function(torch.sigmoid, (y,))
    graph.output(z)
    first = graph_effects(graph)
    assert graph_effects(graph) is first
    forget_effects(graph)
    assert graph_effects(graph) is not first


def _change_a_target(graph: fx.Graph, y: fx.Node) -> None:
    y.target = torch.relu_


def _change_an_argument(graph: fx.Graph, y: fx.Node) -> None:
    y.args = (next(iter(y.users)).args[1],)


def _change_a_keyword(graph: fx.Graph, y: fx.Node) -> None:
    y.kwargs = {"out": y.args[0]}


def _replace_an_input(graph: fx.Graph, y: fx.Node) -> None:
    y.replace_input_with(y.args[0], next(iter(y.users)).args[1])


def _add_a_node(graph: fx.Graph, y: fx.Node) -> None:
    with graph.inserting_after(y):
        graph.call_method("add_", (y, 1))


def _give_an_example_value(graph: fx.Graph, y: fx.Node) -> None:
    y.args[0].meta["example_value"] = torch.ones(2)


def _erase_a_node(graph: fx.Graph, y: fx.Node) -> None:
    next(iter(y.users)).replace_all_uses_with(y)
    graph.erase_node(list(graph.nodes)[-2])


@pytest.mark.parametrize(
    "change",
    [
        _change_a_target,
        _change_an_argument,
        _change_a_keyword,
        _replace_an_input,
        _add_a_node,
        _give_an_example_value,
        _erase_a_node,
    ],
)
def test_effects_are_read_anew_after_any_change(change: Callable[[fx.Graph, fx.Node], None]) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(torch.relu, (x,))
    graph.output(graph.call_function(torch.add, (y, w)))
    before = graph_effects(graph)
    change(graph, y)
    after = graph_effects(graph)
    assert after is not before
    assert after.of == GraphEffects(graph).of
    assert after.order == GraphEffects(graph).order


def test_effects_are_read_anew_after_nodes_changed_places() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    z = graph.call_method("add_", (x, 1))
    graph.output((y, z))
    before = graph_effects(graph)
    z.append(y)
    assert list(graph_effects(graph).order) == [x, z, y, graph.output_node()]
    assert graph_effects(graph) is not before


def test_numbers_share_no_memory_and_lists_of_tensors_do() -> None:
    x = fx.Graph().placeholder("x")
    item = x.graph.call_function(operator.getitem, (x, 0))
    parts = x.graph.call_method("chunk", (x, 2))
    item.meta["example_value"] = 3
    parts.meta["example_value"] = (torch.ones(1), torch.ones(1))
    assert shares_memory_with(item) == () and shares_memory_with(parts) == (x,)
    item.meta["example_value"] = torch.ones(2)
    parts.meta["example_value"] = (1, 1)
    assert shares_memory_with(item) == (x,) and shares_memory_with(parts) == ()


def test_what_export_puts_before_a_graph_to_check_its_inputs_stays() -> None:
    gm = torch.export.export(nn.ReLU(), (torch.ones(2),)).module()
    (guard,) = [node for node in gm.graph.nodes if node.op == "call_module"]
    assert effect_of(guard) == effects.Effect(acts=True) and not is_pure(guard)


@pytest.mark.parametrize(("dropout", "training", "draws"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)])
def test_dropout_inside_attention_and_recurrence_draws(dropout: float, training: bool, draws: bool) -> None:
    attention = ("a", "a", "a", 4, 2, "b", None, None, None, False, dropout, "c", None, training)
    recurrence = ("a", ["b", "b"], ["c"], True, 1, dropout, training, False, False)
    assert effects.is_random(many(F.multi_head_attention_forward, *attention)) is draws
    assert effects.is_random(many(torch.lstm, *recurrence)) is draws


def test_what_the_caller_gets_escapes_and_so_do_its_views() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    z = graph.call_function(torch.sigmoid, (y,))
    graph.output(graph.call_method("view", (z, -1)))
    facts = GraphEffects(graph)
    assert facts.escapes(z) and not facts.escapes(y)


def test_a_module_that_could_not_be_opened_may_do_anything() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    effect = effect_of(graph.call_module("some.path", (x,)))
    assert effect.writes == (x,) and effect.draws and effect.switches and effect.acts
    assert "could not be opened" in effect.unknown


def test_a_method_of_a_number_is_plain_and_one_of_nothing_is_not() -> None:
    x = fx.Graph().placeholder("x")
    assert effect_of(x.graph.call_method("add", (1, x))).is_none
    assert effect_of(x.graph.call_method("add", (None, x))).unknown
