"""What the tests share: captures, tolerances, stable text of graphs, and what must become of a stack.

The stacks themselves and their parallel form are in `tests/blocks.py`, and may be imported from here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from fxfusion import fuse_graph
from fxfusion.compiler.capture import CapturedGraph, capture_model, captured_from_graph
from fxfusion.compiler.pipeline import normalising_passes
from fxfusion.errors import Refusal, RefusalCode
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.graph.effects import writes_in_place
from fxfusion.graph.pass_base import History, Pass, PassRecord
from fxfusion.graph.pass_manager import run_passes
from fxfusion.passes.ffn import Matches
from fxfusion.passes.match_residual import match_residual
from fxfusion.report import FusionReport
from tests.blocks import (
    HIDDEN,
    WIDTH,
    Attention,
    Block,
    Custom,
    Float32Rms,
    Gated,
    Of,
    Packed,
    Plain,
    Rms,
    Stack,
    branch_of,
    customs,
    parallel_form,
    randomise,
    stack,
    tokens,
)

__all__ = [  # what comes from tests/blocks.py
    "HIDDEN",
    "WIDTH",
    "Attention",
    "Block",
    "Custom",
    "Float32Rms",
    "Gated",
    "Of",
    "Packed",
    "Plain",
    "Rms",
    "Stack",
    "branch_of",
    "customs",
    "parallel_form",
    "randomise",
    "stack",
    "tokens",
]

How = Literal["dynamo", "export", "symbolic"]

# --- tolerances: DESIGN, section 3 --------------------------------------------------------------------

# dtype -> error relative to the largest value. Half precision is judged by RMSE against float64.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}
FLOAT32_INSIDE = 1e-6  # float64 models that compute their norm and gain in float32
HALF_RMSE_FACTOR = 2.0
GRADIENT_FACTOR = 2.0


def error_of(fused: Tensor, parallel: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert fused.shape == parallel.shape and fused.dtype == parallel.dtype
    scale = float(parallel.detach().double().abs().max()) or 1.0
    return float((fused.detach().double() - parallel.detach().double()).abs().max()) / scale


def rmse(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth.detach().double()).pow(2).mean().sqrt())


def assert_exact(
    fused: Tensor,
    parallel: Tensor,
    dtype: torch.dtype,
    *,
    truth: Tensor | None = None,
    float32_inside: bool = False,
    gradient: bool = False,
) -> None:
    """The exactness contract for one tensor. `truth`: the float64 parallel form, for half precision."""
    assert fused.dtype == parallel.dtype == dtype
    factor = GRADIENT_FACTOR if gradient else 1.0
    if dtype in RELATIVE:
        limit = factor * (FLOAT32_INSIDE if float32_inside and dtype == torch.float64 else RELATIVE[dtype])
        error = error_of(fused, parallel)
        assert error <= limit, f"{dtype}: relative error {error:.3g}, allowed {limit:.3g}"
        return
    assert truth is not None, "half precision is judged against a float64 run"
    allowed = factor * HALF_RMSE_FACTOR * rmse(parallel, truth)
    error = rmse(fused, truth)
    assert error <= allowed, f"{dtype}: RMSE {error:.3g}, allowed {allowed:.3g}"


# --- captures -----------------------------------------------------------------------------------------


def capture(model: Callable[..., Any], *inputs: Any, how: How = "dynamo", **kwargs: Any) -> CapturedGraph:
    """One graph of `model(*inputs)`: Dynamo's, `torch.export`'s or `symbolic_trace`'s."""
    if how == "dynamo":
        torch._dynamo.reset()
        graphs, _ = capture_model(model, inputs, kwargs)
        assert len(graphs) == 1, f"{len(graphs)} graphs"
        return graphs[0]
    assert isinstance(model, nn.Module) and not kwargs
    gm = torch.export.export(model, inputs).module() if how == "export" else fx.symbolic_trace(model)
    assert isinstance(gm, fx.GraphModule)
    return captured_from_graph(gm, inputs)


def facts_of(captured: CapturedGraph) -> GraphFacts:
    graph = captured.module.graph
    return GraphFacts(graph, captured.weights)


def run_graph(captured: CapturedGraph) -> Any:
    """The captured graph on the inputs it was captured with."""
    return captured.module(*captured.inputs)


def apply(captured: CapturedGraph, *passes: Pass) -> tuple[CapturedGraph, list[PassRecord]]:
    """An edited copy, and what the pass manager recorded."""
    work, history = captured.copy(), History()
    run_passes(work.module, passes, history)
    return work, history.records


def normalise(captured: CapturedGraph) -> CapturedGraph:
    """A copy after all normalising passes."""
    return apply(captured, *normalising_passes(captured.weights))[0]


def match(model: Callable[..., Any], *inputs: Any, how: How = "dynamo") -> Matches:
    """What the matcher finds after normalisation."""
    work = normalise(capture(model, *inputs, how=how))
    return match_residual(facts_of(work), work.opaque)


def fuse(model: nn.Module, *inputs: Tensor, **options: Any) -> tuple[fx.GraphModule, FusionReport]:
    """`fuse_graph` on the traced module."""
    return fuse_graph(fx.symbolic_trace(model), inputs, **options)


def fuse_captured_graph(captured: CapturedGraph, **options: Any) -> tuple[Any, FusionReport]:
    """`fuse_graph` on a captured graph; the result of the fused graph, and the report."""
    fused, report = fuse_graph(captured.module, captured.inputs, **options)
    return fused(*captured.inputs), report


def refusal_with(refusals: Iterable[Refusal], code: RefusalCode, fragment: str = "") -> Refusal:
    """The refusal with this code whose message holds the fragment; fails with all that there are."""
    listed = list(refusals)
    for refusal in listed:
        if refusal.code is code and fragment in refusal.message:
            return refusal
    shown = "\n".join(f"  {refusal.code.value}: {refusal.message}" for refusal in listed) or "  none"
    raise AssertionError(f"no refusal {code.value} with {fragment!r}; there are:\n{shown}")


def refused(**tables: dict[str, tuple[Any, str]]) -> list[Any]:
    """Parameters `(what, code, words)` of tests, of tables by refusal code: name -> (what, words of the refusal)."""
    return [
        pytest.param(what, RefusalCode[code], words, id=name)
        for code, table in tables.items()
        for name, (what, words) in table.items()
    ]


def nodes_named(captured: CapturedGraph, name: str) -> list[fx.Node]:
    """The nodes that do one operation, by its bare name."""
    return [node for node in captured.module.graph.nodes if ops.op_name(node) == name]


# --- stable text of a graph ---------------------------------------------------------------------------


def graph_text(captured: CapturedGraph) -> str:
    """A graph as text that does not change with node names, torch versions or machines.

    Placeholders and attributes are `in0`, `in1`; results are `%0`, `%1`; each with shape and dtype.
    """
    names: dict[fx.Node, str] = {}
    lines = []
    inputs = results = 0
    for node in captured.module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument_text(node.args[0], names)}")
            continue
        if node.op in ("placeholder", "get_attr"):
            names[node] = f"in{inputs}"
            inputs += 1
            kind = "weight" if node.op == "get_attr" or node.name in captured.weights else "input"
            lines.append(f"{names[node]}: {_type_text(node)}  # {kind}")
            continue
        names[node] = f"%{results}"
        results += 1
        call = ops.op_name(node) + ("_" if writes_in_place(node) else "")
        args = [_argument_text(value, names) for value in node.args]
        args += [f"{key}={_argument_text(value, names)}" for key, value in sorted(node.kwargs.items())]
        lines.append(f"{names[node]}: {_type_text(node)} = {call}({', '.join(args)})")
    return "\n".join(lines) + "\n"


def _type_text(node: fx.Node) -> str:
    value = ops.tensor_value(node)
    if value is None:
        return type(node.meta.get("example_value", node.meta.get("val"))).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{[int(size) for size in value.shape]}"


def _argument_text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument_text(item, names) for item in value) + "]"
    return repr(value)


# --- what must become of a stack ---------------------------------------------------------------------


def assert_fuses(model: Stack, x: Tensor, how: How = "symbolic", **options: Any) -> FusionReport:
    """The whole stack becomes one group, exactly; the comparison goes red when one weight is off."""
    result, report = fuse_captured_graph(capture(model, x, how=how), **options)
    fused = result[0] if isinstance(result, (tuple, list)) else result
    sizes = [len(group.members) for group in report.groups]
    assert sizes == [len(model.layers)], f"groups of {sizes}; {[str(refusal) for refusal in report.refusals]}"
    parallel = parallel_form(model, x)
    assert_exact(fused, parallel, x.dtype)
    assert error_of(model(x), parallel) > 1e-3, "the parallel form is the sequential one: the comparison shows nothing"
    with torch.no_grad():
        for parameter in model.layers[-1].parameters():
            parameter.mul_(1.01)
    assert error_of(fused, parallel_form(model, x)) > 1e-6, "a changed weight makes no difference"
    return report


def assert_not_fused(
    model: nn.Module, inputs: Sequence[Any], code: RefusalCode, fragment: str = "", how: How = "symbolic"
) -> FusionReport:
    """No group, the result bit-equal to the graph's own, and a refusal with this code that says why."""
    captured = capture(model, *inputs, how=how)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = copy.deepcopy(captured.module)(*(_fresh(value) for value in captured.inputs))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fused, report = fuse_graph(captured.module, captured.inputs)
        result = fused(*(_fresh(value) for value in captured.inputs))
    assert not report.groups, f"fused {[member.name for member in report.groups[0].members]}"
    for one, other in zip(_flat_tensors(result), _flat_tensors(expected), strict=True):
        assert torch.equal(one, other)
    refusal_with(report.refusals, code, fragment)
    return report


def _fresh(value: Any) -> Any:
    """A copy, since graphs with in-place writes change what they are given."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _flat_tensors(value: Any) -> list[Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _flat_tensors(item)] if isinstance(value, (list, tuple)) else []
