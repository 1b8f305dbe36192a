"""`ffn_fusion`: the torch.compile backend.

    compiled = torch.compile(model, backend=ffn_fusion, options={"policy": "paper"})

Dynamo hands over its graph with the real weights; the fused copy goes to Inductor (or another
compiler) with the packed weights as extra inputs, which a thin wrapper keeps fresh. When nothing can
be fused the graph goes on untouched; when fxfusion itself fails it says so and does the same.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxfusion.compiler.capture import CapturedGraph, capture_dynamo
from fxfusion.compiler.options import BackendOptions
from fxfusion.compiler.packing import FusedCallable, GraphPacks, PackBinding, forget_looks
from fxfusion.compiler.paranoid import ParanoidCallable, why_not_compared
from fxfusion.compiler.pipeline import FusedGraph, fuse_captured
from fxfusion.errors import (
    FxFusionError,
    MissingWeightsError,
    NotFusedError,
    OptionError,
    PlanError,
    RefusalCode,
)
from fxfusion.graph import ops
from fxfusion.graph.effects import records_gradients
from fxfusion.graph.torch_private import (
    as_backend_fake,
    as_user_error,
    backend_named,
    be_registered,
    compile_with_inductor,
    compiled_model,
    ends_at_graph_break,
    inductor_draws_as_eager,
    mark_static_weight,
)
from fxfusion.passes.choose_form import Target
from fxfusion.passes.lift_weights import Pack
from fxfusion.plan.fusion_plan import FusionPlan, Member
from fxfusion.report import FusionReport, GraphReport

log = logging.getLogger("fxfusion")

_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]

_KEPT_REPORTS = 64
_reports: list[FusionReport] = []
_seconds_inside = 0.0
# Plans of models that graph breaks cut into several graphs, by what the user compiled.
_plans_in_parts: weakref.WeakKeyDictionary[Any, set[tuple[tuple[Member, ...], ...]]] = weakref.WeakKeyDictionary()


def ffn_fusion(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Fuse what the policy or plan chooses, then compile. See `fxfusion.compiler.options.BackendOptions`.

    Raises `OptionError` or `PlanError` for bad options, and with `strict=True` `NotFusedError` where a
    planned group was not fused, or the error that would otherwise have caused a fall back.
    """
    start = time.perf_counter()
    be_registered("ffn_fusion", ffn_fusion)
    try:
        settings = BackendOptions.parse(options, mode)
        ready = _fuse_or_fall_back(gm, example_inputs, settings)
    except MissingWeightsError as error:
        return _raise_when_called(error)
    except FxFusionError as error:
        raise as_user_error(error) from error.__cause__
    finally:
        _count_seconds(time.perf_counter() - start)
    if ready is None:
        return _compile(gm, example_inputs, settings)
    compiled = _compile(ready.module, ready.inputs, settings)
    call = FusedCallable(compiled, ready.packs) if ready.packs.bindings else compiled
    return ready.compared(call) if ready.compared else call


def last_reports() -> tuple[FusionReport, ...]:
    """Reports of the graphs that the backend saw in this process, oldest first (the last 64)."""
    return tuple(_reports)


def forget_reports() -> None:
    """Start the list of `last_reports` anew (they hold graphs)."""
    _reports.clear()


def seconds_inside() -> float:
    """Wall time [s] spent inside fxfusion's own steps of the backend, compilers excluded, in this process."""
    return _seconds_inside


def refresh(model: torch.nn.Module) -> int:
    """Make the next call look at the model's weights again; returns how many packed groups it touches.

    Needed only after writes that torch does not count and that change a few elements: `p.data[3, 5] = 1`, or such a
    write to an inference tensor, through numpy, or by another process. All else is seen without: writes that torch
    counts and steps of optimizers by the next call, and whatever else changes a weight widely (a quarter of its rows or
    columns for certain) by the next call on a CPU, elsewhere at the latest one call later, with a warning.
    """
    return forget_looks([*model.parameters(), *model.buffers()])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """A fused graph, its inputs (packed weights last) and what keeps those fresh. `compared`: wraps the compiled graph
    in the comparison of its first calls, where that is asked for and can be."""

    module: fx.GraphModule
    inputs: list[Any]
    packs: GraphPacks
    compared: _Wrapper | None


def _fuse_or_fall_back(gm: fx.GraphModule, inputs: Sequence[Any], settings: BackendOptions) -> _Ready | None:
    """The fused graph; None where the graph is to be compiled as it is."""
    try:
        captured = capture_dynamo(gm, inputs)
        setting = _compiled_for(captured, settings)
        with _out_of_sight_of_hooks(captured.module.graph):
            fused = fuse_captured(
                captured,
                settings.choice,
                verify=settings.verify,
                lift_into=None if setting.training else "placeholder",
                compiled_for=setting,
            )
            why_not = _why_not_compared(fused, settings)
            _report(fused.report, (*fused.notes, *filter(None, [why_not])))
            _report_unmatched(fused, settings, ends_at_graph_break(gm))
            if not fused.report.groups:
                return None
            compared = _comparison(fused, captured, settings) if settings.verify == "paranoid" and not why_not else None
            return _make_ready(fused, captured, compared)
    except (OptionError, PlanError, MissingWeightsError):
        raise
    except Exception as error:
        if settings.strict:
            raise
        words = f"compiling the unfused graph, because {type(error).__name__}: {error}"
        log.warning("fxfusion: %s", words)
        _reports.append(FusionReport(graphs=(), notes=(words,)))
        return None


@contextlib.contextmanager
def _out_of_sight_of_hooks(graph: fx.Graph) -> Iterator[None]:
    """What runs inside is nothing that the model computes, so hooks on saved tensors (activation checkpoints count with
    them) must not see it. Who forbids hooks in the graph has none, and the graph cannot be run under ours."""
    forbids = any(ops.op_name(node) == "_saved_tensors_hooks_disable" for node in graph.nodes)
    same = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # where hooks are forbidden (`torch.func.grad`), nobody has one
            stack.enter_context(contextlib.nullcontext() if forbids else same)
        yield


def _compiled_for(captured: CapturedGraph, settings: BackendOptions) -> Target:
    """Dynamo guards on all that is read here: grad mode, what requires gradients, autocast."""
    differentiable = any(isinstance(value, torch.Tensor) and value.requires_grad for value in captured.inputs)
    return Target(
        request=settings.form,
        training=(torch.is_grad_enabled() and differentiable) or records_gradients(captured.module.graph),
        autocast=torch.is_autocast_enabled("cpu"),
    )


def _why_not_compared(fused: FusedGraph, settings: BackendOptions) -> str:
    """A note on why the first calls cannot be compared, where that was asked for."""
    if settings.verify != "paranoid" or fused.parallel is None:
        return ""
    as_eager = settings.compiler != "inductor" or inductor_draws_as_eager(settings.inductor)
    why = why_not_compared(fused.parallel.module.graph, as_eager)
    return f"paranoid: calls are not compared, because {why}" if why else ""


def _comparison(fused: FusedGraph, captured: CapturedGraph, settings: BackendOptions) -> _Wrapper:
    assert fused.parallel is not None
    attributes = {node.name for node in fused.parallel.module.graph.nodes if node.op == "get_attr"}
    constants = {name: value for name, value in captured.values.items() if name in attributes}
    members = fused.report.groups[0].members
    name = f"{members[0].name} to {members[-1].name}"
    return partial(
        ParanoidCallable, parallel=fused.parallel, constants=constants, calls=settings.paranoid_calls, name=name
    )


def _report(report: GraphReport, notes: tuple[str, ...]) -> None:
    for note in notes:
        log.warning("fxfusion: %s", note)
    _reports.append(FusionReport(graphs=(report,), notes=notes))
    del _reports[:-_KEPT_REPORTS]


def _report_unmatched(fused: FusedGraph, settings: BackendOptions, more_follows: bool) -> None:
    """A planned group, or a policy's window, that was not fused is a warning, and an error when strict.

    Where graph breaks cut a model into several graphs, a group that is wholly absent from one of them
    may be in another, so only a group that is there in part is at fault.
    """
    named = "plan" if isinstance(settings.choice, FusionPlan) else "window"
    planned = settings.choice.groups if isinstance(settings.choice, FusionPlan) else settings.choice.windows
    model = compiled_model()
    if more_follows and model is not None:
        _plans_in_parts.setdefault(model, set()).add(planned)
    codes = {RefusalCode.PLAN_UNMATCHED}
    if not more_follows and (model is None or planned not in _plans_in_parts.get(model, ())):
        codes.add(RefusalCode.PLAN_ABSENT)
    unmatched = [refusal for refusal in fused.report.refusals if refusal.code in codes]
    if not unmatched:
        return
    words = "; ".join(refusal.message for refusal in unmatched)
    if settings.strict:
        raise NotFusedError(f"the {named} does not fit this model: {words}")
    log.warning("fxfusion: %d planned groups were not fused: %s", len(unmatched), words)


def _make_ready(fused: FusedGraph, captured: CapturedGraph, compared: _Wrapper | None) -> _Ready:
    """Compute the packed weights. Raises `MissingWeightsError` where they are on the meta device."""
    packs = GraphPacks([_bind(pack, captured) for pack in fused.packs])
    packed = packs.tensors(captured.inputs) if fused.packs else []
    inputs = [*captured.inputs, *_dress(fused, packed)]
    return _Ready(module=fused.module, inputs=inputs, packs=packs, compared=compared)


def _bind(pack: Pack, captured: CapturedGraph) -> PackBinding:
    places = [node.name for node in captured.module.graph.nodes if node.op == "placeholder"]
    position_of = {name: position for position, name in enumerate(places)}
    baked = [source for source in pack.sources if source not in position_of]
    if baked:
        raise NotFusedError(f"the weight {baked[0]} is baked into the graph (freezing?), so it could go stale")
    positions = [position_of[source] for source in pack.sources]
    return PackBinding(pack, positions)


def _dress(fused: FusedGraph, packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mark the new inputs as weights and fake them for AOTAutograd."""
    names = [name for pack in fused.packs for name in pack.values]
    by_name = {node.name: node for node in fused.module.graph.nodes if node.op == "placeholder"}
    for name in names:
        mark_static_weight(by_name[name])
    return [as_backend_fake(tensor) for tensor in packed]


def _raise_when_called(error: MissingWeightsError) -> Callable[..., Any]:
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
