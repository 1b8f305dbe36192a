"""Choose the form in which a group's sum is computed: the one place with the rule, made from measurements.

    concatenated    wide weights, F.linear                                memory: the group's weights again
    prepacked       wide weights in oneDNN's layout, on huge pages        memory: the group's weights again
    members         one by one on the original weights, in parallel form  memory: none

All are the parallel form up to rounding, so no result depends on the machine. Matches (no edit).
While gradients are recorded a group is computed by "members", on the user's own parameters: nothing is packed, so
nothing can go stale and gradients are native. Who asks for "concatenated" gets the concatenation at each call.
Made from kernel timings and `python -m bench.chain_speed` and its `--norms` on AVX-512 processors, one thread;
what was not measured keeps "concatenated", and its reason says so. One rule serves all kinds: gates and ups before
norms on outputs are wide as others' are, and GEMMs of the same shapes (256 x 704 and 1024 x 2816, 1 to 128 tokens) were
measured to gain and lose in the same places. Source: `python -m bench.chain_speed`.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fxfusion.errors import Refusal, RefusalCode
from fxfusion.graph import ops
from fxfusion.graph.effects import autocasts
from fxfusion.graph.torch_private import is_batched, onednn_packs, size_hint
from fxfusion.passes.ffn import FfnNode, Form, Group, refusal_of

FormRequest = Literal["auto", "concatenated", "prepacked", "members"]

SMALL = 1 << 20
"""Bytes of a group's weights below which the cost of a call outweighs what a better layout gains."""
CACHE = 32 << 20
"""Bytes of weights that the last-level cache holds."""
FEW = 16
"""Tokens from which MKL's float32 GEMM is slower on one wide weight than on the members' weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a graph is compiled for. `request`: a form, or `"auto"`; `training`: gradients are recorded, around the
    graph or inside it (`effects.records_gradients`); `autocast`: it is on, on the CPU, where the graph is called."""

    request: FormRequest = "auto"
    training: bool = False
    autocast: bool = False


def choose_forms(
    groups: Sequence[Group], target: Target, profitable_only: bool
) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """Every group with its form; with `profitable_only`, those that inference would compute by "members" are refused
    instead (with gradients as without, so that both compute the same function)."""
    chosen: list[Group] = []
    refusals: list[Refusal] = []
    for group in groups:
        form, why = _rule(group, replace(target, training=False))
        if profitable_only and form == "members" and group.window is None:  # the mixers of a window have moved by now
            words = f"one wide FFN would not be faster ({why}); profitable_only is True"
            refusals += [refusal_of(ffn, RefusalCode.NOT_PROFITABLE, words) for ffn in group.members]
            continue
        form, why = _rule(group, target)
        chosen.append(replace(group, form=form, why=why))
    return tuple(chosen), tuple(refusals)


def tokens_to_pack_for(group: Group) -> int:
    """oneDNN's layout depends on how many tokens a call has. One layout serves all of a model's graphs.

    float32: blocks of 64 channels are best in cache and for many tokens, plain rows for one token from memory.
    bfloat16: blocks of pairs are best everywhere.
    """
    return 1 if _dtype(group) == torch.float32 and not is_float32_in_cache(group) else 16


def is_float32_in_cache(group: Group) -> bool:
    return _dtype(group) == torch.float32 and weight_bytes(group) <= CACHE


def packed_bytes(group: Group) -> int:
    """Memory of a group's packed weights."""
    with_down = group.end.packs_down(group)
    return 0 if group.form == "members" else sum(member_bytes(member, with_down) for member in group.members)


def weight_bytes(group: Group) -> int:
    return sum(map(member_bytes, group.members))


def member_bytes(ffn: FfnNode, with_down: bool = True) -> int:
    """Memory of an FFN's weights (biases are small change)."""
    values = map(ops.tensor_value, ffn.weights if with_down else ffn.weights[:-1])
    return sum(size_hint(value.numel()) * value.element_size() for value in values if value is not None)


def _rule(group: Group, target: Target) -> tuple[Form, str]:
    if target.training:
        return _training_rule(target.request)
    no_layout = _why_no_layout(group, target)
    if target.request != "auto":
        if target.request == "prepacked" and no_layout:
            return "concatenated", f"prepacked was asked for, but {no_layout}"
        return target.request, "asked for"
    if _device(group).type != "cpu":
        return "concatenated", f"the default; not measured on {_device(group).type}"
    if weight_bytes(group) < SMALL:
        return "concatenated", "small: fewer calls are all that counts"
    if not no_layout:
        return "prepacked", f"fastest for {_name(_dtype(group))} on CPU at any number of tokens"
    if _dtype(group) == torch.float32 and _tokens(group.members[0]) >= FEW:
        return "members", f"float32 GEMMs of {FEW} tokens and more are slower on wide weights; {no_layout}"
    return "concatenated", f"fewer and larger GEMMs; {no_layout}"


def _training_rule(request: FormRequest) -> tuple[Form, str]:
    if request in ("concatenated", "members"):
        return request, "asked for" + ("; gradients are recorded, so at each call" if request == "concatenated" else "")
    asked = "prepacked was asked for, but " if request == "prepacked" else ""
    return "members", f"{asked}gradients are recorded: computed from the model's own parameters"


def _why_no_layout(group: Group, target: Target) -> str:
    """Why the weights cannot be in oneDNN's layout; empty where they can."""
    if _device(group).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return "oneDNN's layouts were measured on x86 processors only"
    if not onednn_packs(_dtype(group)):
        return f"oneDNN packs no {_name(_dtype(group))} weights here"
    first = group.members[0]
    if is_batched(ops.tensor_value(first.stream)):
        return "the group is inside torch.vmap"
    return "autocast is on" if autocasts(first.add, "cpu", target.autocast) else ""


def _dtype(group: Group) -> torch.dtype:
    dtypes = [value.dtype for value in map(ops.tensor_value, group.members[0].weights) if value is not None]
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float64


def _device(group: Group) -> torch.device:
    value = ops.tensor_value(group.members[0].down.weight)
    return torch.device("meta") if value is None else value.device


def _tokens(ffn: FfnNode) -> int:
    value = ops.tensor_value(ffn.stream)
    return 1 if value is None else size_hint(value.numel()) // ffn.hidden


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
