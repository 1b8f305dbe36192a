"""Open the modules that a graph calls, so that every operation on a weight is a node, one per tensor.

Before:  h = fc1(x)                                 call_module
After:   w = fc1.weight; b = fc1.bias; h = linear(x, w, b)

A module that cannot be traced stays a `call_module`; matchers refuse what runs through it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx


class _OpenTracer(fx.Tracer):
    """Traces into every module, those of `torch.nn` too."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def attribute(module: torch.nn.Module, path: str) -> Any:
    """`attribute(model, "layers.3.weight")`."""
    value: Any = module
    for step in path.split("."):
        value = getattr(value, step)
    return value


def inline_modules(gm: fx.GraphModule) -> int:
    """Replace `call_module` nodes by what the modules compute, in place; returns how many."""
    opened = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            try:
                inner = _OpenTracer().trace(_without_checks(module))
            except Exception:
                # Not traceable (data-dependent control flow): it stays whole, and refusals name it.
                continue
            opened += _splice(gm, node, module, inner)
    if opened + _merge_attributes(gm):
        gm.recompile()
    return opened


def _without_checks(module: torch.nn.Module) -> torch.nn.Module:
    """The module, or a copy with the same parameters where it asks for the number of axes: the example has shown it."""
    if not hasattr(module, "_check_input_dim"):
        return module
    unchecked = copy.copy(module)
    unchecked.__dict__["_check_input_dim"] = lambda input: None
    return unchecked


def _merge_attributes(gm: fx.GraphModule) -> int:
    """Read each tensor by one node, whatever paths lead to it; returns how many nodes went.

    Tracers write a node for each use, and a tied weight would look like two, of which a write shows on one only.
    """
    first: dict[int, fx.Node] = {}
    merged = 0
    for node in list(gm.graph.nodes):
        value = attribute(gm, str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor) and first.setdefault(id(value), node) is not node:
            node.replace_all_uses_with(first[id(value)])
            gm.graph.erase_node(node)
            merged += 1
    return merged


def _splice(gm: fx.GraphModule, node: fx.Node, module: torch.nn.Module, inner: fx.Graph) -> int:
    """Copy a module's graph to the place where it is called. Returns 1, or 0 if the call does not fit."""
    parameters = [found for found in inner.nodes if found.op == "placeholder"]
    if len(parameters) < len(node.args) or any(found.target.startswith("*") for found in parameters):
        return 0
    stand_in: dict[fx.Node, Any] = {}
    for index, found in enumerate(parameters):
        default = found.args[0] if found.args else None
        name = str(found.target)
        stand_in[found] = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
    path = str(node.target)
    stack = dict(node.meta.get("nn_module_stack") or {}) | {path: (path, type(module))}
    for found in inner.nodes:
        if found.op in ("placeholder", "output"):
            continue
        with gm.graph.inserting_before(node):
            target = f"{path}.{found.target}" if found.op in ("get_attr", "call_module") else found.target
            args, kwargs = (fx.node.map_arg(a, stand_in.__getitem__) for a in (found.args, found.kwargs))
            copy = gm.graph.create_node(found.op, target, args, kwargs)
        copy.meta = {"nn_module_stack": stack, "stack_trace": node.meta.get("stack_trace")}
        stand_in[found] = copy
    result = next(found for found in inner.nodes if found.op == "output").args[0]
    node.replace_all_uses_with(fx.node.map_arg(result, stand_in.__getitem__))
    gm.graph.erase_node(node)
    return 1


def drop_unused_state(gm: fx.GraphModule) -> None:
    """Delete sub-modules, parameters and buffers that no node reads."""
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    for path, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        steps = path.split(".")
        if not any(".".join(steps[:end]) in used for end in range(1, len(steps) + 1)):
            owner, _, name = path.rpartition(".")
            delattr(gm.get_submodule(owner), name)
    gm.delete_all_unused_submodules()
