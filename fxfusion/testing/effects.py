"""What a random stack does beside computing: in-place writes, views, caches, counters, random draws, custom operators.

Every effect is one function of the stream and of the stack's memory (its buffers); none knows of graphs. Traced by fx
or by Dynamo, and run in eager, it does the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxfusion.graph.torch_private import FOREACH
from fxfusion.testing import spec

Memory = Mapping[str, Tensor]
"""`counter`, `other`: [4]; `places`: [2], integers; `cache`: as the stream, `[batch, seq, hidden]`; `noise`: [4]."""
NAMES = ("counter", "other", "noise", "places", "cache")


@torch.library.custom_op("stacks::count", mutates_args=("into",))
def count(into: Tensor) -> None:
    """Add 1 in place, as an operator of which nobody knows more than its schema."""
    into.add_(1.0)


@torch.library.custom_op("stacks::keep", mutates_args=("into",))
def keep(x: Tensor, into: Tensor) -> None:
    """Copy x into a cache, as an operator of which nobody knows more than its schema."""
    into.copy_(x)


def count_in_python(into: Tensor) -> None:
    """A function of nobody's library that writes its argument and returns nothing."""
    into.add_(1.0)


def memory(tokens: tuple[int, int], hidden: int) -> dict[str, Tensor]:
    """New buffers, float64 but for the places."""
    made = {name: torch.zeros(4, dtype=torch.float64) for name in ("counter", "other", "noise")}
    made["places"] = torch.tensor([2, 0])
    return made | {"cache": torch.zeros(*tokens, hidden, dtype=torch.float64)}


def apply(kind: spec.EffectKind, x: Tensor, held: Memory) -> tuple[Tensor, list[Tensor]]:
    """The stream after the effect, and what it gives out besides."""
    if kind in BESIDE:
        BESIDE[kind](held)
        return x, []
    if kind in READING:
        READING[kind](x, held)
        return x, []
    if kind in WRITING:
        WRITING[kind](x, held)
        return x, []
    if kind == "view_read_later":
        return x, [x[..., :2]]
    return F.dropout(x, 0.25, True), []


def put(target: Tensor, place: Any, value: Any) -> None:
    """`target[place] = value`, which fx does not let one write on a proxy."""
    _call(operator.setitem, target, place, value)


def _call(function: Callable[..., Any], *args: Any) -> None:
    for value in args:
        if isinstance(value, fx.Proxy):
            value.tracer.create_proxy("call_function", function, args, {})
            return
    function(*args)


BESIDE: dict[str, Callable[[Memory], object]] = {
    "count": lambda held: held["counter"].add_(1.0),
    "foreach_count": lambda held: FOREACH["add"]([held["counter"], held["other"]], 1.0),
    "out_count": lambda held: torch.add(held["counter"], 1.0, out=held["other"]),
    "put_count": lambda held: held["counter"].index_put_((held["places"],), held["other"][:2] + 1.0),
    "set_count": lambda held: put(held["counter"], 0, 2.0),
    "view_count": lambda held: held["counter"][1:].mul_(0.5),
    "copy_count": lambda held: held["other"].copy_(held["counter"]),
    "noise": lambda held: held["noise"].normal_(),
    "custom_count": lambda held: count(held["counter"]),
    "python_count": lambda held: _call(count_in_python, held["counter"]),
}
"""Effects that have nothing to do with the stream."""
READING: dict[str, Callable[[Tensor, Memory], object]] = {
    "copy_cache": lambda x, held: held["cache"].copy_(x),
    "set_cache": lambda x, held: put(held["cache"], (slice(None), 0), x[:, 0]),
    "out_cache": lambda x, held: torch.mul(x, 2.0, out=held["cache"]),
    "foreach_cache": lambda x, held: FOREACH["copy"]([held["cache"]], [x]),
    "custom_cache": lambda x, held: keep(x, held["cache"]),
}
"""Effects that write what they read from the stream."""
WRITING: dict[str, Callable[[Tensor, Memory], object]] = {
    "add_": lambda x, held: x.add_(0.25),
    "set_channel": lambda x, held: put(x, (..., 0), 0.5),
    "put_batch": lambda x, held: x.index_put_((held["places"][1:],), held["cache"][:1]),
    "scale_view": lambda x, held: x[..., :2].mul_(0.5),
    "scale_flat": lambda x, held: x.view(-1).mul_(0.5),
    "foreach_scale": lambda x, held: FOREACH["mul"]([x], 0.5),
    "out_scale": lambda x, held: torch.mul(x, 0.5, out=x),
    "copy_from_cache": lambda x, held: x.copy_(held["cache"]),
    "custom_write": lambda x, held: count(x),
}
"""Effects that write the stream itself."""
