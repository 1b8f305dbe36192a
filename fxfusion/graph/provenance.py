"""Where a node comes from: module paths, layer numbers, source lines, and who created it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import fx

_ROOT = re.compile(r"^(?:L__self__+|L\['[^']*'\]|G\['[^']*'\]|self)(?:\.|$)")
_CELL = re.compile(r"^.*__closure__\[\d+\]\.cell_contents(?:\.|$)")
_INDEX = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def clean_path(raw: str) -> str:
    """`L['self'].model._modules['layers']._modules['3']` -> `model.layers.3`.

    A model that a compiled function closes over is named as if it had been compiled itself.
    """
    path = _ROOT.sub("", _CELL.sub("", raw))
    path = _INDEX.sub(lambda found: "." + next(group for group in found.groups() if group is not None), path)
    return path.replace("._modules.", ".").replace("_modules.", "").strip(".")


def module_path(node: fx.Node) -> str:
    """The innermost module that the node was traced in; empty at the root or without provenance."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(str(list(stack.values())[-1][0]))


def enclosing_modules(node: fx.Node) -> list[str]:
    """All modules that were running when the node was traced, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path in (clean_path(str(entry[0])) for entry in stack.values()) if path]


def has_provenance(node: fx.Node) -> bool:
    return bool(node.meta.get("nn_module_stack"))


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The deepest module that holds all the nodes (those without provenance are passed over)."""
    paths = [module_path(node).split(".") for node in nodes if has_provenance(node)]
    if not paths:
        return ""
    shared: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def layer_path(nodes: Iterable[fx.Node]) -> str:
    """The common module path, cut after its last number: `model.layers.3.mlp` -> `model.layers.3`."""
    steps = common_path(nodes).split(".")
    for end in range(len(steps), 0, -1):
        if steps[end - 1].isdigit():
            return ".".join(steps[:end])
    return ""


def owning_layer(owners: Sequence[fx.Node], add: fx.Node) -> str:
    """The layer of a branch and its addition; that of the branch alone where the model adds outside its layers."""
    return layer_path((*owners, add)) or layer_path(owners)


def layer_numbers(paths: Sequence[str]) -> list[int | None]:
    """The number of each layer path that tells it from the others.

    A path may hold several numbers (`block.3.layer.1`); the one that varies most over the given
    paths counts, the first of them where two vary alike.
    """
    numbers = [[int(step) for step in path.split(".") if step.isdigit()] for path in paths]
    depth = max((len(found) for found in numbers), default=0)
    variety = [len({found[index] for found in numbers if len(found) > index}) for index in range(depth)]
    if not variety:
        return [None] * len(paths)
    best = variety.index(max(variety))
    return [found[best] if len(found) > best else None for found in numbers]


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost model frame that made the node; empty where none was recorded."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line}"


def copy_provenance(source: fx.Node, target: fx.Node, made_by: str, members: Sequence[str]) -> None:
    """Give a created node the origin of the node it replaces, and say which pass made it from what."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]
    target.meta["fxfusion"] = {"pass": made_by, "from": list(members)}
