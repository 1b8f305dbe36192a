"""Prove which constants of a norm are a gain and a shift, so that they can be folded into weights.

Matches (no edit):
    n(x; g, s) = n(x; 1, 0) * g + s        x: [tokens, hidden]; g, s: [hidden] or one number
on random float64 streams, gains and shifts, whatever the norm's spelling (`(1 + w)` included: the
constant is then the sum), and by structure: between a gain and the end of the norm stand only sums,
products, casts and views, so that no threshold (a clamp) can hide from the random numbers. Casts are
left out and views are skipped, so the proof is of the formula, not of its rounding. Needs no weights,
so it works on `meta` models.
Source: arXiv 2503.18908, section 5.5 (the norm's diagonal can be pushed into the next layer).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.isomorphism import Structure
from fxfusion.graph.torch_private import outside_fake_mode, size_hint
from fxfusion.passes.ffn import Branch, Role
from fxfusion.passes.match_pieces import VIEWS, keeps_channels

_TOKENS = 3
_TRIALS = 2
_TOLERANCE = 1e-9
# What may be done to a gain or shift, and to values that it has entered.
_AFFINE = ops.CASTS | VIEWS | {"mul", "add", "addcmul", "layer_norm", "rms_norm", "native_layer_norm", "getitem"}


class NormProver:
    """Proves prologues; remembers the answer for each structure."""

    def __init__(self) -> None:
        self._known: dict[tuple[Structure, int], tuple[Role, ...]] = {}

    def roles(self, ffn: Branch) -> tuple[Role, ...]:
        """The role of each constant of the FFN's prologue; `"fixed"` where no other role was proved."""
        key = (ffn.prologue_structure, ffn.hidden)
        if key not in self._known:
            with outside_fake_mode(), torch.no_grad():
                self._known[key] = _search(ffn)
        return self._known[key]


def _search(ffn: Branch) -> tuple[Role, ...]:
    choices: list[tuple[Role, ...]] = []
    for constant in ffn.prologue_constants:
        value = ops.tensor_value(constant)
        foldable = value is not None and value.numel() in (1, ffn.hidden)
        choices.append(("gain", "shift", "fixed") if foldable else ("fixed",))
    fixed: tuple[Role, ...] = tuple("fixed" for _ in choices)
    if len(choices) > 4:
        return fixed
    for roles in sorted(itertools.product(*choices), key=lambda found: found.count("fixed")):
        if roles == fixed or _holds(ffn, roles):
            return roles
    return fixed


def _holds(ffn: Branch, roles: tuple[Role, ...]) -> bool:
    folded = [node for node, role in zip(ffn.prologue_constants, roles, strict=True) if role != "fixed"]
    if not _is_affine_after(ffn, folded):
        return False
    generator = torch.Generator().manual_seed(2503)
    try:
        return all(_holds_once(ffn, roles, generator) for _ in range(_TRIALS))
    except (AssertionError, TypeError, RuntimeError, ValueError, IndexError, AttributeError):
        # A prologue that does not run on a few tokens in float64 is unproved, not wrong.
        return False


def _is_affine_after(ffn: Branch, constants: Sequence[fx.Node]) -> bool:
    """Whether only sums, products, casts, views and divisions of it touch what the constants have entered."""
    entered = set(constants)
    for node in ffn.prologue:
        if entered & set(node.all_input_nodes):
            divided = ops.op_name(node) == "div" and ops.argument(node, 1, "other") not in entered
            if ops.op_name(node) not in _AFFINE and not divided:
                return False
            entered.add(node)
    return True


def _holds_once(ffn: Branch, roles: tuple[Role, ...], generator: torch.Generator) -> bool:
    rank = len(ops.tensor_of(ffn.stream).shape)
    x = torch.randn(_TOKENS if rank > 1 else 1, ffn.hidden, generator=generator, dtype=torch.float64)
    x = _with_rank(x, rank)
    constants = {node: _random_like(node, generator) for node in ffn.prologue_constants}
    plain = dict(constants)
    gain, shift = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for node, role in zip(ffn.prologue_constants, roles, strict=True):
        if role == "gain":
            gain, plain[node] = gain * constants[node].flatten(), torch.ones_like(constants[node])
        elif role == "shift":
            shift, plain[node] = shift + constants[node].flatten(), torch.zeros_like(constants[node])
    return _close(_run(ffn, x, constants), _run(ffn, x, plain) * gain + shift)


def _with_rank(value: torch.Tensor, rank: int) -> torch.Tensor:
    """`[tokens, channels]` with as many axes as the graph has there."""
    if rank < 2:
        return value.reshape(-1)
    return value.reshape(*[1] * (rank - 2), -1, value.shape[-1])


def _random_like(node: fx.Node, generator: torch.Generator) -> Any:
    if ops.tensor_value(node) is None:
        return ops.plain_example(node)
    shape = [size_hint(size) for size in ops.tensor_of(node).shape]
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 2.0


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    scale = one.abs().max()
    return bool(torch.isfinite(scale)) and bool((one - other).abs().max() <= _TOLERANCE * scale)


def _run(ffn: Branch, x: torch.Tensor, constants: Mapping[fx.Node, Any]) -> torch.Tensor:
    """The prologue on a few tokens in float64: casts do nothing, views of the token axes keep their order."""
    values: dict[fx.Node, Any] = {ffn.stream: x.clone(), **constants}

    def value_of(found: fx.Node) -> Any:
        return values[found] if found in values else ops.plain_example(found)

    for node in ffn.prologue:
        name = ops.op_name(node)
        if name in ops.CASTS:
            values[node] = _cast(node, value_of(node.all_input_nodes[0]))
        elif name in VIEWS and _same_channels(node):
            # A copy: an in-place node after it must not write the value before it.
            values[node] = _with_rank(value_of(node.all_input_nodes[0]), len(ops.tensor_of(node).shape)).clone()
        else:
            values[node] = ops.compute(node, value_of, literal=_wide)
    found = values[ffn.normed]
    assert isinstance(found, torch.Tensor)
    return found


def _cast(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    dtype = ops.tensor_of(node).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"a cast to {dtype} is more than rounding")
    return value


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _same_channels(node: fx.Node) -> bool:
    """Whether a view regroups tokens only (`unsqueeze(-1)` after a reduction does more)."""
    return keeps_channels(node, node.all_input_nodes[0]) and ops.op_name(node) not in ("unsqueeze", "squeeze")
