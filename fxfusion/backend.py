"""`ffn_fusion`: the torch.compile backend.

    compiled = torch.compile(model, backend=ffn_fusion, options={"policy": "paper"})

Dynamo hands over its graph with the real weights; the fused copy goes to Inductor (or another
compiler) with the packed weights as extra inputs, which a thin wrapper keeps fresh. When nothing can
be fused the graph goes on untouched; when fxfusion itself fails it says so and does the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.capture import CapturedGraph, capture_dynamo
from fxfusion.errors import FxFusionError, NotFusedError, OptionError, PlanError, RefusalCode
from fxfusion.options import BackendOptions
from fxfusion.packing import FusedCallable, PackBinding, forget_stamps
from fxfusion.passes.lift_weights import Pack
from fxfusion.pipeline import Fused, fuse_captured
from fxfusion.report import FusionReport
from fxfusion.torch_private import as_backend_fake, backend_named, compile_with_inductor, mark_static_weight

log = logging.getLogger("fxfusion")

_KEPT_REPORTS = 64
_reports: list[FusionReport] = []
_seconds_inside = 0.0


def ffn_fusion(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse what the policy or plan chooses, then compile. See `fxfusion.options.BackendOptions`.

    Raises `OptionError` or `PlanError` for bad options, and with `strict=True` `NotFusedError` where a
    planned group was not fused, or the error that would otherwise have caused a fall back.
    """
    start = time.perf_counter()
    settings = BackendOptions.parse(options, mode)
    captured = capture_dynamo(gm, example_inputs)
    fused = _fuse_or_fall_back(captured, settings)
    _count_seconds(time.perf_counter() - start)
    if fused is None or not fused.packs:
        return _compile(gm, example_inputs, settings)
    return _compile_fused(fused, captured, settings)


def last_reports() -> tuple[FusionReport, ...]:
    """Reports of the graphs that the backend saw in this process, oldest first (the last 64)."""
    return tuple(_reports)


def seconds_inside() -> float:
    """Wall time [s] spent inside fxfusion's own steps of the backend, compilers excluded, in this process."""
    return _seconds_inside


def refresh(model: torch.nn.Module) -> int:
    """Make the next call look at the model's weights again; returns how many packed groups it touches.

    Needed only after writes that torch does not count: `p.data.mul_(...)`, or writes to inference tensors.
    """
    return forget_stamps([*model.parameters(), *model.buffers()])


def _fuse_or_fall_back(captured: CapturedGraph, settings: BackendOptions) -> Fused | None:
    try:
        fused = fuse_captured(captured, settings.choice, verify=settings.verify)
    except (OptionError, PlanError):
        raise
    except Exception as error:
        if settings.strict:
            raise
        log.warning("fxfusion: compiling the unfused graph, because %s: %s", type(error).__name__, error)
        return None
    _reports.append(FusionReport(graphs=(fused.report,)))
    del _reports[:-_KEPT_REPORTS]
    _report_unmatched(fused, settings)
    return fused


def _report_unmatched(fused: Fused, settings: BackendOptions) -> None:
    """A planned group that was not fused is a warning, and an error when strict."""
    unmatched = [refusal for refusal in fused.report.refusals if refusal.code is RefusalCode.PLAN_UNMATCHED]
    if not unmatched:
        return
    words = "; ".join(refusal.message for refusal in unmatched)
    if settings.strict:
        raise NotFusedError(f"the plan does not fit this model: {words}")
    log.warning("fxfusion: %d planned groups were not fused: %s", len(unmatched), words)


def _compile_fused(fused: Fused, captured: CapturedGraph, settings: BackendOptions) -> Callable[..., Any]:
    try:
        bindings = [_bind(pack, captured) for pack in fused.packs]
        packed = [tensor for binding in bindings for tensor in binding.tensors(captured.inputs)]
    except FxFusionError as error:
        return _raise_when_called(error)
    inputs = [*captured.inputs, *_dress(fused, packed)]
    return FusedCallable(_compile(fused.module, inputs, settings), bindings)


def _bind(pack: Pack, captured: CapturedGraph) -> PackBinding:
    names = [node.name for node in captured.module.graph.nodes if node.op == "placeholder"]
    positions = [names.index(source) for source in pack.sources]
    return PackBinding(pack, positions, differentiable=torch.is_grad_enabled())


def _dress(fused: Fused, packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mark the new inputs as weights and fake them for AOTAutograd."""
    names = [name for pack in fused.packs for name in pack.values]
    by_name = {node.name: node for node in fused.module.graph.nodes if node.op == "placeholder"}
    for name in names:
        mark_static_weight(by_name[name])
    return [as_backend_fake(tensor) for tensor in packed]


def _raise_when_called(error: FxFusionError) -> Callable[..., Any]:
    def missing(*_: Any) -> Any:
        raise error

    return missing


def _compile(gm: fx.GraphModule, inputs: Sequence[Any], settings: BackendOptions) -> Callable[..., Any]:
    if settings.compiler == "inductor":
        return compile_with_inductor(gm, inputs, settings.mode, dict(settings.inductor))
    compiled: Callable[..., Any] = backend_named(settings.compiler)(gm, list(inputs))
    return compiled


def _count_seconds(seconds: float) -> None:
    global _seconds_inside
    _seconds_inside += seconds
