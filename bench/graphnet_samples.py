"""Rebuild the graphs of GraphNet's samples, node by node, without running their code.

A sample is a folder with `model.py`, the code that torch.fx wrote for one captured graph, and `weight_meta.py`, the
shape and dtype of each of its inputs. The code is parsed, never executed: each statement becomes the node that wrote
it, so in-place additions and writes to slices stay what they were. Every node runs once on fake tensors, on the CPU
whatever the sample says, and only operations of torch that compute with tensors are let in.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from fxfusion.compiler.capture import CapturedGraph

_OPERATORS = dict(
    pair.split("=")
    for pair in "Add=add Sub=sub Mult=mul Div=truediv FloorDiv=floordiv Mod=mod Pow=pow MatMult=matmul BitAnd=and_ "
    "BitOr=or_ BitXor=xor LShift=lshift RShift=rshift Eq=eq NotEq=ne Lt=lt LtE=le Gt=gt GtE=ge USub=neg UAdd=pos "
    "Invert=invert Not=not_".split()
)
_FOLDERS = (  # where functions that compute with tensors live
    "torch.nn.functional. torch.functional. torch._C._nn. torch._C._fft. torch._C._linalg. torch._C._special. "
    "torch.ops.aten. torch.ops.prims. torch._C._functorch. torch._functorch.predispatch. torch._functorch.vmap."
).split()
_OTHERS = frozenset(
    "torch._C._set_grad_enabled torch._C._log_api_usage_once torch.amp.autocast_mode._enter_autocast "
    "torch.amp.autocast_mode._exit_autocast torch.Size torch.sym_int torch.sym_float torch.sym_max torch.sym_min "
    "torch.sym_not torch.sym_sum torch.sym_ite torch.sym_sqrt torch._check torch._check_is_size".split()
)
_FILES = frozenset(("from_file", "load", "save"))  # they read or write files


class NotRebuilt(Exception):
    """The sample cannot be made a graph again; the message says why, in words that many samples can share."""


def samples(folder: Path) -> list[Path]:
    """The folders of all samples, sorted. Raises `ValueError` where there is none."""
    found = sorted(path.parent for path in folder.glob("**/model.py") if (path.parent / "graph_net.json").exists())
    if not found:
        raise ValueError(
            f"{folder} holds no samples: expected folders with model.py, graph_net.json and weight_meta.py, as below "
            "samples/ of github.com/PaddlePaddle/GraphNet"
        )
    return found


def rebuild(sample: Path) -> CapturedGraph:
    """The sample's graph with an example value at each node, as Dynamo would have handed it over.

    Raises `NotRebuilt`.
    """
    reader = _Reader()
    reader.read(_forward(sample / "model.py"))
    values = _run_on_fake_tensors(reader.graph, input_facts(sample))
    return CapturedGraph(
        module=fx.GraphModule(torch.nn.Module(), reader.graph),
        inputs=tuple(node.meta["example_value"] for node in reader.inputs),
        weights=frozenset(node.name for node in reader.inputs if node in reader.weights),
        values={node.name: values[node] for node in reader.weights},
    )


def input_facts(sample: Path) -> dict[str, dict[str, Any]]:
    """What `weight_meta.py` and `input_meta.py` say of each input, by name: literals only."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("weight_meta.py", "input_meta.py"):
        path = sample / name
        for part in _parsed(path).body if path.exists() else ():
            if isinstance(part, ast.ClassDef):
                facts = dict(_literals(part))
                found[str(facts.get("name", part.name))] = facts
    return found


def _literals(part: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for line in part.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            try:
                yield line.targets[0].id, ast.literal_eval(line.value)
            except ValueError:
                continue  # data with inf or nan in it; nothing here needs it


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise NotRebuilt(f"{path.name} cannot be read: {type(error).__name__}") from error


def _forward(path: Path) -> ast.FunctionDef:
    classes = [part for part in _parsed(path).body if isinstance(part, ast.ClassDef)]
    methods = [part for found in classes for part in found.body if isinstance(part, ast.FunctionDef)]
    if len(methods) != 1 or methods[0].name != "forward":
        raise NotRebuilt(f"{path.name} does not hold one class with one method, forward")
    return methods[0]


class _Reader:
    """Turns the statements of one `forward` into nodes. Names are those of the code; each may be given anew."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.weights: set[fx.Node] = set()
        self.named: dict[str, Any] = {"inf": float("inf"), "nan": float("nan"), "Ellipsis": ...}

    def read(self, forward: ast.FunctionDef) -> None:
        for argument in forward.args.args[1:]:
            node = self.graph.placeholder(argument.arg)
            self.named[argument.arg] = node
            self.inputs.append(node)
            held = "_buffers_" in argument.arg or "_parameters_" in argument.arg
            if held or (argument.annotation is not None and "Parameter" in ast.unparse(argument.annotation)):
                self.weights.add(node)
        for statement in forward.body:
            self._statement(statement)
        if not any(node.op == "output" for node in self.graph.nodes):
            raise NotRebuilt("forward returns nothing")

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return):
            self.graph.output(self._value(statement.value) if statement.value is not None else None)
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            name = "i" + _OPERATORS[type(statement.op).__name__].strip("_")
            operands = (self._value(ast.Name(statement.target.id)), self._value(statement.value))
            self.named[statement.target.id] = self.graph.call_function(getattr(operator, name), operands)
        elif isinstance(statement, ast.Assign):
            value = self._value(statement.value)
            for target in statement.targets:
                self._assign(target, value)
        elif isinstance(statement, ast.Expr):
            self._value(statement.value)
        else:
            raise NotRebuilt(f"a statement {type(statement).__name__} is not understood")

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            if value is None:
                self.named.pop(target.id, None)
            else:
                self.named[target.id] = value
        elif isinstance(target, ast.Subscript):
            self.graph.call_function(operator.setitem, (self._value(target.value), self._value(target.slice), value))
        else:
            raise NotRebuilt(f"an assignment to {type(target).__name__} is not understood")

    def _value(self, part: ast.expr) -> Any:
        found: Callable[[Any], Any] | None = getattr(self, f"_{type(part).__name__.lower()}", None)
        if found is None:
            raise NotRebuilt(f"an expression {type(part).__name__} is not understood")
        return found(part)

    def _constant(self, part: ast.Constant) -> Any:
        return part.value

    def _name(self, part: ast.Name) -> Any:
        if part.id not in self.named:
            raise NotRebuilt("a name is read that nothing has given a value")
        return self.named[part.id]

    def _tuple(self, part: ast.Tuple) -> Any:
        return tuple(map(self._value, part.elts))

    def _list(self, part: ast.List) -> Any:
        return [self._value(each) for each in part.elts]

    def _slice(self, part: ast.Slice) -> Any:
        return slice(*(each and self._value(each) for each in (part.lower, part.upper, part.step)))

    def _unaryop(self, part: ast.UnaryOp) -> Any:
        return self._operator(part.op, self._value(part.operand))

    def _binop(self, part: ast.BinOp) -> Any:
        return self._operator(part.op, self._value(part.left), self._value(part.right))

    def _compare(self, part: ast.Compare) -> Any:
        if len(part.ops) != 1:
            raise NotRebuilt("a chain of comparisons is not understood")
        return self._operator(part.ops[0], self._value(part.left), self._value(part.comparators[0]))

    def _operator(self, kind: ast.AST, *operands: Any) -> Any:
        name = _OPERATORS.get(type(kind).__name__)
        if name is None:
            raise NotRebuilt(f"an operator {type(kind).__name__} is not understood")
        target = getattr(operator, name)
        if not any(isinstance(each, fx.Node) for each in operands):
            return target(*operands)
        return self.graph.call_function(target, operands)

    def _subscript(self, part: ast.Subscript) -> Any:
        return self.graph.call_function(operator.getitem, (self._value(part.value), self._value(part.slice)))

    def _attribute(self, part: ast.Attribute) -> Any:
        path = _dotted(part)
        if path.startswith("torch."):
            value = _resolved(path)
            if not isinstance(value, (torch.dtype, torch.layout, torch.memory_format, float)):
                raise NotRebuilt(f"{path} is no value that a graph may hold")
            return value
        return self.graph.call_function(getattr, (self._receiver(part.value), _plain_name(part.attr)))

    def _receiver(self, part: ast.expr) -> fx.Node:
        value = self._value(part)
        if not isinstance(value, fx.Node):
            raise NotRebuilt("an attribute or method of something that is no value of the graph")
        return value

    def _call(self, part: ast.Call) -> Any:
        path = _dotted(part.func)
        arguments = tuple(map(self._value, part.args))
        keywords = {str(each.arg): self._value(each.value) for each in part.keywords}
        if path == "slice":
            return slice(*arguments)
        if path in ("device", "torch.device"):
            return torch.device("cpu")
        if path.startswith("torch."):
            return self.graph.call_function(_function(path), arguments, _on_the_cpu(keywords))
        if not isinstance(part.func, ast.Attribute):
            raise NotRebuilt(f"a call of {path or 'an expression'} is not understood")
        receiver = self._receiver(part.func.value)
        name = _plain_name(part.func.attr)
        return self.graph.call_method("cpu" if name == "cuda" else name, (receiver, *arguments), _on_the_cpu(keywords))


def _dotted(part: ast.expr) -> str:
    """`torch._C._nn.gelu` as text; empty where it is no such path."""
    names: list[str] = []
    while isinstance(part, ast.Attribute):
        names.append(part.attr)
        part = part.value
    return ".".join([part.id, *reversed(names)]) if isinstance(part, ast.Name) else ""


def _resolved(path: str) -> Any:
    value: Any = torch
    for name in path.split(".")[1:]:
        try:
            value = getattr(value, name)
        except (AttributeError, RuntimeError) as error:
            raise NotRebuilt(f"this torch has no {path}") from error
    return value


def _function(path: str) -> Callable[..., Any]:
    """What the path names, if it computes with tensors: no file, no process, no loading of code."""
    name = path.rsplit(".", 1)[1]
    value = _resolved(path)
    plain = path.count(".") == 1 and inspect.isbuiltin(value)
    if name in _FILES or not (plain or path in _OTHERS or path.startswith(tuple(_FOLDERS))):
        raise NotRebuilt(f"{path} is not let in")
    found: Callable[..., Any] = value
    return found


def _plain_name(name: str) -> str:
    if name.startswith("_") and not callable(vars(operator).get(name)):
        raise NotRebuilt(f"the private attribute {name} is not let in")
    return name


def _on_the_cpu(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.device("cpu") if name == "device" and value else value for name, value in keywords.items()}


def _run_on_fake_tensors(graph: fx.Graph, facts: Mapping[str, Mapping[str, Any]]) -> dict[fx.Node, Any]:
    """Give every node its example value; returns them."""
    values: dict[fx.Node, Any] = {}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with _modes_restored(values), torch.no_grad(), mode:
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = _fake_input(node, facts)
            elif node.op != "output":
                values[node] = _result(node, values)
            if node in values:
                node.meta["example_value"] = values[node]
    return values


def _fake_input(node: fx.Node, facts: Mapping[str, Mapping[str, Any]]) -> torch.Tensor:
    known = facts.get(str(node.target))
    dtype = getattr(torch, str(known.get("dtype", "")).removeprefix("torch."), None) if known else None
    if known is None or not isinstance(dtype, torch.dtype) or "shape" not in known:
        raise NotRebuilt("weight_meta.py says nothing of an input")
    return torch.empty(known["shape"], dtype=dtype)


def _result(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)
    except Exception as error:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        raise NotRebuilt(f"{name} does not run on fake tensors: {type(error).__name__}") from error


@contextmanager
def _modes_restored(values: Mapping[fx.Node, Any]) -> Iterator[None]:
    """Leave no autocast or level of functorch behind where a graph stopped between entering and leaving it."""
    try:
        yield
    finally:
        entered: list[Callable[[], Any]] = []
        for node, value in values.items():
            name = getattr(node.target, "__name__", "")
            if name.endswith("_increment_nesting"):
                entered.append(torch._C._functorch._vmap_decrement_nesting)
            elif name == "_enter_autocast":
                entered.append(lambda value=value: torch.amp.autocast_mode._exit_autocast(value))
            elif name in ("_vmap_decrement_nesting", "_exit_autocast"):
                entered.pop()
        while entered:
            entered.pop()()
