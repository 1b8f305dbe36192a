"""Prove which constants of a norm are a gain and a shift, so that they can be folded into weights.

Matches (no edit):
    n(x; g, s) = n(x; 1, 0) * g + s        x: [tokens, hidden]; g, s: [hidden] or one number
on random float64 streams, gains and shifts, whatever the norm's spelling (`(1 + w)` included: the
constant is then the sum). Casts are left out and views are skipped, so the proof is of the formula,
not of its rounding. Needs no weights, so it works on `meta` models.
Source: issue 2; arXiv 2503.18908, section 5.5 (the norm's diagonal can be pushed into the next layer).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.isomorphism import Structure
from fxfusion.passes.ffn import FfnNode, Role
from fxfusion.passes.match_pieces import VIEWS
from fxfusion.torch_private import outside_fake_mode

_TOKENS = 3
_TRIALS = 2
_TOLERANCE = 1e-9
_CASTS = frozenset("to type_as float double half bfloat16".split())


class NormProver:
    """Proves prologues; remembers the answer for each structure."""

    def __init__(self) -> None:
        self._known: dict[tuple[Structure, int], tuple[Role, ...]] = {}

    def roles(self, ffn: FfnNode) -> tuple[Role, ...]:
        """The role of each constant of the FFN's prologue; `"fixed"` where no other role was proved."""
        key = (ffn.prologue_structure, ffn.hidden)
        if key not in self._known:
            with outside_fake_mode(), torch.no_grad():
                self._known[key] = _search(ffn)
        return self._known[key]


def _search(ffn: FfnNode) -> tuple[Role, ...]:
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


def _holds(ffn: FfnNode, roles: tuple[Role, ...]) -> bool:
    generator = torch.Generator().manual_seed(2503)
    for _ in range(_TRIALS):
        x = torch.randn(_TOKENS, ffn.hidden, generator=generator, dtype=torch.float64)
        constants = {node: _random_like(node, generator) for node in ffn.prologue_constants}
        plain = dict(constants)
        gain, shift = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for node, role in zip(ffn.prologue_constants, roles, strict=True):
            if role == "gain":
                gain, plain[node] = gain * constants[node].flatten(), torch.ones_like(constants[node])
            elif role == "shift":
                shift, plain[node] = shift + constants[node].flatten(), torch.zeros_like(constants[node])
        try:
            whole, without = _run(ffn, x, constants), _run(ffn, x, plain)
        except (TypeError, RuntimeError, ValueError):
            # A prologue that does not run on [tokens, hidden] in float64 is unproved, not wrong.
            return False
        if not _close(whole, without * gain + shift):
            return False
    return True


def _random_like(node: fx.Node, generator: torch.Generator) -> torch.Tensor:
    example = ops.tensor_value(node)
    assert example is not None
    return torch.randn(tuple(example.shape), generator=generator, dtype=torch.float64) + 2.0


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    scale = one.abs().max()
    return bool(torch.isfinite(scale)) and bool((one - other).abs().max() <= _TOLERANCE * scale)


def _run(ffn: FfnNode, x: torch.Tensor, constants: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The prologue on `[tokens, hidden]` in float64: casts and views of the token axes do nothing."""
    values: dict[fx.Node, Any] = {ffn.stream: x, **constants}
    for node in ffn.prologue:
        if ops.is_shape_value(node):
            continue
        name = ops.op_name(node)
        if name in _CASTS or (name in VIEWS and _same_channels(node)):
            values[node] = values[node.all_input_nodes[0]]
            continue
        args = fx.node.map_arg(node.args, lambda found: values.get(found, found))
        kwargs = fx.node.map_arg(node.kwargs, lambda found: values.get(found, found))
        kwargs = {key: torch.float64 if isinstance(value, torch.dtype) else value for key, value in kwargs.items()}
        args = tuple(torch.float64 if isinstance(value, torch.dtype) else value for value in args)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif callable(node.target):
            values[node] = node.target(*args, **kwargs)
    found = values[ffn.normed]
    assert isinstance(found, torch.Tensor)
    return found


def _same_channels(node: fx.Node) -> bool:
    """Whether a view regroups tokens only (`unsqueeze(-1)` after a reduction does more)."""
    before, after = ops.tensor_value(node.all_input_nodes[0]), ops.tensor_value(node)
    if before is None or after is None or before.dim() == 0 or after.dim() == 0:
        return False
    return str(before.shape[-1]) == str(after.shape[-1]) and ops.op_name(node) not in ("unsqueeze", "squeeze")
