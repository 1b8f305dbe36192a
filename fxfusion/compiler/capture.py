"""Turn what the user has into one form: a graph of calls, with example values, that knows its weights.

| source | weights are | call |
|---|---|---|
| Dynamo (`torch.compile`, `explain`) | placeholders whose source is a module | `capture_dynamo` |
| `torch.export(...).module()` | attributes | `captured_from_graph` |
| `make_fx` | attributes | `captured_from_graph` |
| `torch.fx.symbolic_trace` | attributes, inside modules that are opened here | `captured_from_graph` |
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import fx

from fxfusion.compiler.unwrap import offloaded
from fxfusion.errors import CaptureError
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import keep_unread
from fxfusion.graph.inline import attribute, inline_modules
from fxfusion.graph.torch_private import (
    FakeTensor,
    FakeTensorMode,
    copy_dynamo_facts,
    fake_mode_of,
    fake_modes_of,
    is_fsdp_managed,
    is_module_state,
    lazy_graph_module,
    size_hint,
)

_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_MACHINERY = frozenset(vars(torch.nn.Module()))  # what a module keeps about itself
_DATA = {name: (0, "input") for name in ("linear", "mm", "matmul", "bmm")} | {"addmm": (1, "mat1")}
"""Which argument of a linear layer holds the tokens."""
_serial = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedGraph:
    """A graph and its weights. `weights`: names of placeholders that hold module state.

    `values`: the weights' tensors by node name (attributes too). `opaque`: weights that cannot be
    packed, by node name, with the reason.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    weights: frozenset[str] = frozenset()
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    opaque: Mapping[str, str] = field(default_factory=dict)

    def copy(self) -> CapturedGraph:
        """The same with a graph of its own, to be edited; tensors are shared."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.module.graph.nodes:
            # Arguments go in afterwards: `create_node` would walk them all, which takes as long as the rest.
            new = copies[node] = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
            new.args = fx.node.map_arg(node.args, copies.__getitem__)
            if node.kwargs:
                new.kwargs = fx.node.map_arg(node.kwargs, copies.__getitem__)
            new.meta.update(node.meta)
        keep_unread([copies[node] for node in self.module.graph.nodes if not node.users])
        module = lazy_graph_module(self.module, graph)
        copy_dynamo_facts(self.module, module)
        return replace(self, module=module)


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
    """A graph as Dynamo hands it to a backend; `example_inputs` in placeholder order."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values: dict[str, torch.Tensor] = {}
    opaque: dict[str, str] = {}
    weights = set()
    data = _parameters_that_are_data(gm.graph, dict(zip(placeholders, example_inputs, strict=True)))
    for node, value in zip(placeholders, example_inputs, strict=True):
        if not isinstance(value, torch.Tensor) or node in data:
            continue
        if is_module_state(node) or isinstance(value, torch.nn.Parameter):
            weights.add(node.name)
            values[node.name] = value
            reason = _opaque_reason(value) or ("the weight is managed by FSDP" if is_fsdp_managed(node) else "")
            if reason:
                opaque[node.name] = reason
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            _note_attribute(gm, node, values, opaque)
    return CapturedGraph(
        module=gm, inputs=tuple(example_inputs), weights=frozenset(weights), values=values, opaque=opaque
    )


def _parameters_that_are_data(graph: fx.Graph, given: Mapping[fx.Node, Any]) -> Set[fx.Node]:
    """Parameters of no module that linear layers take as their input: soft prompts, latents that are optimised.

    What is computed from weights alone would count as constant, and no layer's input is.
    """
    state = {node for node in given if is_module_state(node)}
    loose = {node for node, value in given.items() if isinstance(value, torch.nn.Parameter)} - state
    data: set[fx.Node] = set()
    while loose - data:
        constants = GraphFacts(graph, state | loose - data).constants
        inputs = (ops.argument(node, *_DATA[name]) for node in graph.nodes if (name := ops.op_name(node)) in _DATA)
        sources = next((ops.reached([node]).keys() & loose for node in inputs if node in constants), set())
        found = {node for node in sources if given[node].dim() > 1}  # not the gains of norms on the way
        if not found:
            break
        data |= found
    return data


def captured_from_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
    """A graph module from `symbolic_trace`, `torch.export` or Dynamo. `gm` is not changed.

    Raises `CaptureError` if the example inputs do not fit the graph.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(example_inputs):
        raise CaptureError(f"the graph has {len(placeholders)} inputs, {len(example_inputs)} example inputs were given")
    work = CapturedGraph(module=gm, inputs=tuple(example_inputs)).copy().module
    inline_modules(work)
    _fill_example_values(work, example_inputs)
    return capture_dynamo(work, example_inputs)


def capture_model(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[CapturedGraph], tuple[str, ...]]:
    """The graphs that Dynamo finds in `model(*args, **kwargs)`, and notes on what went wrong on the way.

    Nothing is computed: each graph, once captured, is answered with zeros of the right shapes.
    """
    found: list[CapturedGraph] = []

    def collect(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(capture_dynamo(gm, inputs))
        return _zeros_for(gm)

    try:
        with _as_it_was(model):
            torch.compile(_fresh_caller(model), backend=collect, dynamic=False)(*args, **kwargs)
    except Exception as error:
        if not found:
            why = offloaded(model) or f"{type(error).__name__}: {error}"
            raise CaptureError(f"the model could not be captured: {why}") from error
        stopped = f"capture stopped after {len(found)} graphs: {type(error).__name__}: {error}"
        return _taken(found), (stopped,)
    if not found:
        raise CaptureError("Dynamo found no graph in the model (does it compute anything on tensors?)")
    breaks = "" if len(found) == 1 else f"graph breaks cut the model into {len(found)} graphs"
    return _taken(found), tuple(filter(None, (breaks, offloaded(model))))


@contextmanager
def _as_it_was(model: Callable[..., Any]) -> Iterator[None]:
    """Give modules back what they held: a model that sets an attribute in `forward` would keep a zero answer."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    before = [_held_by(module) for module in modules]
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            now = _held_by(module)
            for name in now.keys() - old.keys():
                delattr(module, name)
            for name, value in old.items():
                if now.get(name, module) is not value:
                    setattr(module, name, value)


def _held_by(module: torch.nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in vars(module).items() if name not in _MACHINERY}
    return {**plain, **dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _taken(found: list[CapturedGraph]) -> list[CapturedGraph]:
    """The graphs, out of the list: Dynamo keeps every backend it has seen, and with it the list and the weights."""
    taken = list(found)
    found.clear()
    return taken


def _fresh_caller(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own code object that calls the model, so that its captures are not limited or reused."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"explain_{next(_serial)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def _zeros_for(gm: fx.GraphModule) -> Callable[..., Any]:
    """A stand-in for the graph that returns zeros, and inputs that the graph returns as they are."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]

    def run(*inputs: Any) -> Any:
        given = dict(zip(placeholders, inputs, strict=True))

        def stand_in(node: fx.Node) -> Any:
            value = ops.example(node)
            if node in given:
                return given[node]
            if isinstance(value, torch.Tensor):
                shape = [size_hint(size) for size in value.shape]
                return torch.zeros(shape, dtype=value.dtype, device=value.device)
            return size_hint(value) if not isinstance(value, float) else value

        return fx.node.map_arg(outputs, stand_in)

    return run


def _note_attribute(gm: fx.GraphModule, node: fx.Node, values: dict[str, torch.Tensor], opaque: dict[str, str]) -> None:
    value = attribute(gm, str(node.target))
    if isinstance(value, torch.Tensor):
        values[node.name] = value
        reason = _opaque_reason(value)
        if reason:
            opaque[node.name] = reason


def _opaque_reason(value: torch.Tensor) -> str:
    """Why a weight cannot be packed; empty when it can."""
    if type(value) not in _PLAIN:
        return f"the weight is a {type(value).__name__}, a tensor subclass that cannot be concatenated yet"
    if value.layout != torch.strided:
        return f"the weight has layout {value.layout}"
    if value.is_quantized:
        return "the weight is quantised"
    return ""


def _fill_example_values(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Give every node a fake example value where the capture left none."""
    if len(set(fake_modes_of(gm.graph))) > 1:  # values of several modes cannot meet
        for node in gm.graph.nodes:
            node.meta.pop("val", None)
    mode = fake_mode_of(gm.graph) or FakeTensorMode()
    lacking = [n for n in gm.graph.nodes if n.op != "output" and not {"val", "example_value"} & n.meta.keys()]
    for node in lacking:
        if node.op == "get_attr":
            value = attribute(gm, str(node.target))
            if isinstance(value, torch.Tensor):
                node.meta["example_value"] = mode.from_tensor(value, static_shapes=True)
    if all(node.op in ("get_attr", "call_module") for node in lacking):
        return
    inputs = [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in example_inputs]
    try:
        with mode:
            _Filler(gm, mode).run(*inputs)
    except Exception as error:
        raise CaptureError(f"the graph does not run on the example inputs: {error}") from error


class _Filler(fx.Interpreter):
    """Runs a graph on fake tensors and keeps every value."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr" and "example_value" in n.meta:
            return n.meta["example_value"]
        result = super().run_node(n)
        if n.op != "output" and "val" not in n.meta:
            n.meta["example_value"] = result
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fake = {name: self.mode.from_tensor(value, static_shapes=True) for name, value in state.items()}
        return torch.func.functional_call(module, fake, args, kwargs)
