"""Prove one rewrite: the fused group against its parallel form, on random streams.

The parallel form is taken from the graph as it was before `concatenate` touched it, and both are
interpreted with the model's real weights. Tolerances are those of the exactness contract:

| dtype | fused against parallel |
|---|---|
| float64 | 1e-10 of the largest value (1e-6 where the model itself computes in float32 inside) |
| float32 | 1e-5 of the largest value |
| float16, bfloat16 | RMSE against a float64 run at most twice the parallel form's own |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxfusion.errors import VerificationError
from fxfusion.graph import ops
from fxfusion.torch_private import outside_fake_mode, size_hint

_CASTS = frozenset("to type_as float double half bfloat16".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One group's proof. `error` and `limit` are relative (see the module's table)."""

    group: int
    dtype: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def to_dict(self) -> dict[str, object]:
        return {
            "group": self.group,
            "dtype": self.dtype,
            "error": self.error,
            "limit": self.limit,
            "passed": self.passed,
        }


@dataclass(frozen=True, slots=True)
class Region:
    """A copy of the nodes from `stream` to the addition that ends a group, as a graph of its own.

    `inputs`: names of the outer values that it reads, the stream first.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]


def extract_region(stream: fx.Node, end: fx.Node) -> Region:
    """Copy what `end` needs, down to the stream and to values without inputs."""
    order = {node: index for index, node in enumerate(end.graph.nodes)}
    needed: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            if node is not stream and not (ops.is_shape_value(node) and order[node] < order[stream]):
                pending.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = [stream]
    copies[stream] = graph.placeholder("stream")
    for node in sorted(needed - {stream}, key=order.__getitem__):
        if not (set(node.all_input_nodes) & set(copies)) and (node.op != "call_function" or node.all_input_nodes):
            copies[node] = graph.placeholder(node.name)
            inputs.append(node)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    return Region(graph, tuple(inputs))


def verify_group(
    group: int, parallel: Region, fused: Region, weights: Mapping[str, torch.Tensor], seed: int = 0
) -> Verification:
    """Compare both forms. Raises `VerificationError` where they differ or the weights are missing."""
    with outside_fake_mode(), torch.no_grad():
        stream = _random_stream(parallel.inputs[0], seed)
        before = _run(parallel, stream, weights)
        after = _run(fused, stream, weights)
        result = _compare(
            group,
            before,
            after,
            lambda: _run(parallel, stream.double(), weights, exact=True),
            mixed=_uses_float32(parallel),
        )
    if not result.passed:
        raise VerificationError(
            f"group {group}: the fused FFN differs from the parallel form by {result.error:.3g}, "
            f"allowed {result.limit:.3g}"
        )
    return result


def _compare(
    group: int, before: torch.Tensor, after: torch.Tensor, exact: Callable[[], torch.Tensor], mixed: bool
) -> Verification:
    dtype = str(before.dtype).removeprefix("torch.")
    if not torch.equal(before.isfinite(), after.isfinite()):
        return Verification(group=group, dtype=dtype, error=float("inf"), limit=0.0)
    finite = before.isfinite()
    if not bool(finite.any()):
        return Verification(group=group, dtype=dtype, error=0.0, limit=0.0)
    one, other = before[finite].double(), after[finite].double()
    if before.dtype in (torch.float16, torch.bfloat16):
        truth = exact()[finite].double()
        scale = float(truth.pow(2).mean().sqrt()) or 1.0
        limit = 2.0 * float((one - truth).pow(2).mean().sqrt()) / scale + 1e-6
        return Verification(
            group=group, dtype=dtype, error=float((other - truth).pow(2).mean().sqrt()) / scale, limit=limit
        )
    limit = 1e-5 if before.dtype == torch.float32 else 1e-6 if mixed else 1e-10
    error = float((one - other).abs().max()) / max(float(one.abs().max()), 1e-30)
    return Verification(group=group, dtype=dtype, error=error, limit=limit)


def _uses_float32(region: Region) -> bool:
    """Whether the model computes in float32 inside (folding then moves a float64 model by about 5e-8)."""
    values = (ops.tensor_value(node) for node in region.graph.nodes)
    return any(value is not None and value.dtype == torch.float32 for value in values)


def _random_stream(node: fx.Node, seed: int) -> torch.Tensor:
    example = ops.tensor_value(node)
    assert example is not None
    shape = [max(size_hint(size), 1) for size in example.shape]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype=example.dtype, device=example.device)


def _run(
    region: Region, stream: torch.Tensor, weights: Mapping[str, torch.Tensor], *, exact: bool = False
) -> torch.Tensor:
    """Interpret a region; with `exact`, in float64 throughout (casts do nothing)."""
    values: list[Any] = [stream]
    for node in region.inputs[1:]:
        if node.name in weights:
            value = weights[node.name]
            if value.device.type == "meta":
                raise VerificationError(f"cannot verify: the weight {node.name} is on the meta device")
            values.append(value.double() if exact and value.is_floating_point() else value)
        else:
            example = node.meta.get("example_value", node.meta.get("val"))
            values.append(_plain(example))
    runner = _Float64(region.graph) if exact else fx.Interpreter(torch.nn.Module(), graph=region.graph)
    result = runner.run(*values)
    assert isinstance(result, torch.Tensor)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(size_hint(item) for item in value)
    return value if isinstance(value, float) else size_hint(value)


class _Float64(fx.Interpreter):
    """Runs a graph with every float in float64."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)

    def run_node(self, n: fx.Node) -> Any:
        if ops.op_name(n) in _CASTS:
            return self.env[n.all_input_nodes[0]]
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, _wide(args), {key: _wide(value) for key, value in kwargs.items()})


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, tuple):
        return tuple(_wide(item) for item in value)
    return value
