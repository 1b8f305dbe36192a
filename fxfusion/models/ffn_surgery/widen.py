"""Set parameters to tensors of other sizes, and the numbers by which the modules around know these sizes.

Before:  gate_proj: Linear(in_features=64, out_features=160)
After:   gate_proj: Linear(in_features=64, out_features=640)         the same module, of the same class
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxfusion.models.ffn_surgery.layout import Member

# Where a size alone does not tell which number is meant, its name does.
_OUT, _IN, _INNER = (re.compile(words) for words in ("out|nf", "in_|nx", "inter|inner|ff"))


def tensor_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by name; None where its module could have it and has not."""
    owner, attribute = _owner(model, name)
    found: Tensor | None = getattr(owner, attribute)
    return found


def set_parameter(model: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a tensor in the place of a parameter or buffer; a new parameter trains if its neighbours do. A parameter
    is taken as it is, None takes it away."""
    owner, attribute = _owner(model, name)
    own = dict(owner.named_parameters(recurse=False))
    if attribute in dict(owner.named_buffers(recurse=False)):
        setattr(owner, attribute, value)
        return
    if value is not None and not isinstance(value, nn.Parameter):
        neighbours = [own[attribute]] if attribute in own else list(own.values())
        value = nn.Parameter(
            value, requires_grad=value.is_floating_point() and any(n.requires_grad for n in neighbours)
        )
    owner.register_parameter(attribute, value)


def empty(module: nn.Module) -> None:
    """Let go of all parameters of a module; meta tensors of the same sizes take their places."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            nothing = torch.empty(value.shape, dtype=value.dtype, device="meta")  # a plain tensor, whatever it was
            part.register_parameter(name, nn.Parameter(nothing, requires_grad=value.requires_grad))


def set_width(model: nn.Module, ffn: Member, layer_path: str, old: int, new: int) -> None:
    """Correct what the modules of an FFN know of its width. `layer_path`: of its decoder layer."""
    owners = [_owner(model, matrix.weight)[0] for matrix in ffn.matrices]
    hidden = next(
        size for size in model.get_parameter(ffn.down.weight).shape if size != new or old == new
    )  # of the down projection, the size that is not the width
    for number, owner in enumerate(owners[:-1]):
        pieces = sum(cut.projection == number for cut in ffn.cuts)
        _replace(owner, pieces * old, pieces * new, _OUT if pieces * old == hidden else None)
    _replace(owners[-1], old, new, _IN if old == hidden else None)
    for path in _around(ffn, layer_path):
        for pieces in {1, *(sum(cut.projection == number for cut in ffn.cuts) for number in range(len(owners) - 1))}:
            _replace(model.get_submodule(path), pieces * old, pieces * new, _INNER if pieces * old == hidden else None)


def resize(linear: nn.Module, old: int, new: int, side: Literal["in", "out"]) -> None:
    """Correct what a linear layer knows of one of its sizes."""
    _replace(linear, old, new, _OUT if side == "out" else _IN)


def _replace(owner: nn.Module, old: int, new: int, named: re.Pattern[str] | None) -> None:
    for name, value in list(vars(owner).items()):
        if type(value) is int and value == old and (named is None or named.search(name)):
            setattr(owner, name, new)


def _around(ffn: Member, layer_path: str) -> list[str]:
    """Paths of the modules that hold the whole FFN, from its decoder layer down."""
    steps = [name.removeprefix(f"{layer_path}.").split(".")[:-2] for name in ffn.large]
    shared: list[str] = []
    for parts in zip(*steps, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return [".".join([layer_path, *shared[:end]]) for end in range(len(shared) + 1)]


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
