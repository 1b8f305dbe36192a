"""Read sizes, dtypes and devices from the earliest value that has the same, and compute with sizes at the top.

Before:
    y1 = x + F1(x)                                                      x, y1: [batch, seq, hidden]
    n = y1.size(0) * y1.size(1);  f = view(y1, n, hidden);  b = view_as(F2(f), y1);  y2 = y1 + b
After:
    n = x.size(0) * x.size(1);  s = x.size()
    y1 = x + F1(x);  f = view(y1, n, hidden);  b = view(F2(f), s);  y2 = y1 + b

Exact: only what is known of two tensors before they are computed is exchanged. In a graph with symbolic sizes (Dynamo
and export guard on them) equal sizes are equal expressions; in any other graph a sum has the size of its operand and a
view the size that it was given. Values that the graph writes in place are left alone: a write may resize them. What
reads only a size is then no reader of the stream, and sizes of one expression are one value.
Source: https://github.com/pytorch/pytorch/issues/111190.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.editor import GraphEditor, write_out
from fxfusion.graph.effects import graph_effects, is_pure
from fxfusion.graph.pass_base import Pass, PassResult
from fxfusion.graph.torch_private import OpOverload

_READS = frozenset("size dim ndimension numel nelement len sym_size sym_numel".split())
_ATTRIBUTES = frozenset("shape ndim dtype device layout is_cuda is_cpu".split())
_KEEP_SIZE = frozenset("add sub mul div dropout clone contiguous".split())
_AS = {"view_as": "view", "reshape_as": "reshape", "expand_as": "expand"}
_DTYPE_AS = frozenset("type_as to".split())

_SPELLED = _AS.keys() | _DTYPE_AS

_Look = tuple[object, ...]


class ReadSizesEarly(Pass):
    name: ClassVar[str] = "read_sizes_early"
    exact: ClassVar[bool] = True

    def run(self, graph: fx.Graph) -> PassResult:
        if not any(map(_reads_a_look, graph.nodes)):
            return PassResult(0)
        changed = sum(_spell_out(node, self.name) for node in list(graph.nodes))
        sources = _Sources(graph)
        sizes = _Sizes(graph, sources)
        for node in list(graph.nodes):
            if ops.op_name(node) == "stride":
                changed += sizes.write_out(node)
            elif _reads_only_looks(node):
                changed += sources.redirect(node)
                changed += sizes.settle(node)
        return PassResult(changed)


class _Sources:
    """For each tensor the earliest one that is known to have its size, dtype and device."""

    def __init__(self, graph: fx.Graph) -> None:
        self.effects = graph_effects(graph)
        self.symbolic = any(map(_is_symbolic, graph.nodes))
        self._first: dict[_Look, fx.Node] = {}
        if self.symbolic:
            # Before the first linear layer: what stands in one branch is nothing for others to read.
            for node in itertools.takewhile(lambda node: ops.op_name(node) not in ops.LINEARS, graph.nodes):
                look = _look(node)
                if look and not self._is_written(node):
                    self._first.setdefault(look, node)

    def redirect(self, node: fx.Node) -> int:
        """Let a node that reads only the look of a tensor read that of the earliest; whether that is another."""
        tensors = _tensors(node)
        if len(tensors) != 1 or self.are_written(node):
            return 0
        source = self._first.get(_look(tensors[0]), tensors[0]) if self.symbolic else self._behind(tensors[0])
        if source is tensors[0]:
            return 0
        node.replace_input_with(tensors[0], source)
        return 1

    def _behind(self, node: fx.Node) -> fx.Node:
        """The value that the node has its look from by what it does, whatever the sizes are."""
        while True:
            candidates = node.all_input_nodes if ops.op_name(node) in _KEEP_SIZE else _given_size_of(node)
            same = [source for source in candidates if _look(source) == _look(node) and not self._is_written(source)]
            if not same:
                return node
            node = min(same, key=lambda source: self.effects.order.get(source, -1))

    def are_written(self, node: fx.Node) -> bool:
        """Whether the graph writes a tensor that the node reads."""
        return any(map(self._is_written, _tensors(node)))

    def _is_written(self, node: fx.Node) -> bool:
        return self.effects.root(node) in self.effects.written


class _Sizes:
    """Sizes and what is computed from them, each at its earliest place and only once."""

    def __init__(self, graph: fx.Graph, sources: _Sources) -> None:
        self._sources = sources
        self._by_call: dict[Any, fx.Node] = {}
        given = ((node, ops.example(node)) for node in graph.nodes if node.op == "placeholder")
        self._by_expression = {str(value): node for node, value in given if isinstance(value, torch.SymInt)}

    def settle(self, node: fx.Node) -> int:
        """Write out a plain number, replace a value that is there already, or move the node up; whether it did."""
        if not node.users or self._sources.are_written(node):
            return 0
        if self.write_out(node):
            return 1
        value = ops.example(node)
        call = (node.op, node.target, repr(node.args), repr(node.kwargs))
        same = self._by_call.setdefault(call, node)
        if isinstance(value, torch.SymInt) and same is node:
            same = self._by_expression.setdefault(str(value), node)
        if same is not node:
            node.replace_all_uses_with(same)
            node.graph.erase_node(node)
            return 1
        return _move_up(node)

    def write_out(self, node: fx.Node) -> int:
        """Put a number or dtype in the place of the node, where that is known: a SymInt may be a constant."""
        value = ops.example(node)
        if type(value) is torch.SymInt and str(value).isdecimal():
            value = int(str(value))
        returned = any(user.op == "output" for user in node.users)
        if not self._sources.symbolic or type(value) not in (int, torch.dtype) or not node.users or returned:
            return 0
        write_out(node, value)
        return 1


def _move_up(node: fx.Node) -> int:
    """Put the node behind the last of its inputs."""
    inputs = set(node.all_input_nodes)
    place = node.prev
    while place not in inputs and place.op not in ("root", "placeholder") and _reads_only_looks(place):
        place = place.prev
    if place in inputs or place.op in ("root", "placeholder"):
        return 0
    while place not in inputs and place.op not in ("root", "placeholder"):
        place = place.prev
    place.append(node)
    return 1


def _spell_out(node: fx.Node, made_by: str) -> int:
    """Write what reads a tensor for its look alone as a function of sizes, dtype and device, where that is the same.

    `view_as(a, x)`: `view(a, x.size())`. `type_as(a, x)`: `to(a, x.dtype)`, where the device stays.
    """
    name = ops.op_name(node)
    tensors: list[Any] = [value for value in node.args if ops.tensor_value(value) is not None]
    if name not in _SPELLED or node.kwargs or not len(node.args) == len(tensors) == 2:
        return 0
    made = (_viewed if name in _AS else _cast)(GraphEditor(node, made_by, ()), node, *tensors)
    if made is None:
        return 0
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return 1


def _viewed(editor: GraphEditor, node: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node | None:
    name = _AS[ops.op_name(node)]
    if not isinstance(node.target, OpOverload):
        return editor.method(name, value, _size_of(editor, node, like))
    target: Callable[..., Any] = getattr(torch.ops.aten, name).default
    return editor.call(target, value, _size_of(editor, node, like))


def _cast(editor: GraphEditor, node: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node | None:
    before, example = ops.tensor_value(value), ops.tensor_value(like)
    if before is None or example is None or before.device != example.device:
        return None
    if isinstance(node.target, OpOverload):
        return editor.call(torch.ops.aten.to.dtype, value, example.dtype)
    return editor.method("to", value, editor.call(getattr, like, "dtype"))


def _size_of(editor: GraphEditor, node: fx.Node, like: fx.Node) -> fx.Node | list[Any]:
    """The size of a tensor, spelled as the node is: exported graphs ask for one dimension at a time."""
    example = ops.tensor_value(like)
    if not isinstance(node.target, OpOverload) or example is None:
        return editor.method("size", like)
    read = torch.ops.aten.sym_size.int
    return [size if type(size) is int else editor.call(read, like, dim) for dim, size in enumerate(example.shape)]


def _reads_a_look(node: fx.Node) -> bool:
    return ops.op_name(node) in _SPELLED or _reads_only_looks(node)


def _reads_only_looks(node: fx.Node) -> bool:
    """Whether the node asks a tensor for its size, dtype or device, or computes with such answers."""
    if node.op not in ("call_function", "call_method") or not ops.is_shape_value(node):
        return False
    name = ops.op_name(node)
    if name in _READS or name == "getattr" and node.args[1] in _ATTRIBUTES:
        return True
    return is_pure(node) and all(map(ops.is_shape_value, node.all_input_nodes))


def _given_size_of(view: fx.Node) -> list[fx.Node]:
    """The tensors whose sizes a view was given, each in its own place; plain numbers may stand between them."""
    if ops.op_name(view) not in ("view", "reshape", "expand"):
        return []
    given = view.args[1:]
    if len(given) == 1 and isinstance(given[0], fx.Node) and _is_whole_size(given[0]):
        return given[0].all_input_nodes
    sizes = list(given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given)
    places = [(size, place) for place, size in enumerate(sizes) if not isinstance(size, int)]
    found = [_size_at(size, place) if isinstance(size, fx.Node) else None for size, place in places]
    return [] if None in found else [tensor for tensor in dict.fromkeys(found) if tensor is not None]


def _is_whole_size(node: fx.Node) -> bool:
    name = ops.op_name(node)
    return name == "size" and len(node.args) == 1 and not node.kwargs or name == "getattr" and node.args[1] == "shape"


def _size_at(node: fx.Node, place: int) -> fx.Node | None:
    """The tensor whose size at the place the node is; None for any other number."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or ops.argument(node, 1, "dim") != place:
        return None
    if ops.op_name(node) == "getitem" and _is_whole_size(source):
        return source.all_input_nodes[0]
    return source if ops.op_name(node) in ("size", "sym_size") else None


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if ops.tensor_value(source) is not None]


def _is_symbolic(node: fx.Node) -> bool:
    value = ops.example(node)
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _look(node: fx.Node) -> _Look:
    value = ops.tensor_value(node)
    return () if value is None else (*ops.shape_of(node), value.dtype, value.device)
