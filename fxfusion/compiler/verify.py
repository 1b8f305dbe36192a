"""Prove a rewrite: the graph against its parallel form, in eager mode, on made-up inputs and the model's real weights.

Compared are, in one run of each form (`observe`),

    the sum that each fused group, and each block of joined mixers, computes     each on the parallel form's own stream
    all outputs, all inputs and weights that the graph writes, and what operations read that are not run
    the order of all effects that can be seen from outside

and likewise the captured graph with what the exact clean-up made of it (`"clean-up"`). The parallel form is the graph
before any group was touched, run with the members of each group reading the group's stream; mixers of wide blocks read
one stream already. The tolerance follows the lowest precision inside what is compared:

| lowest precision inside | allowed |
|---|---|
| float64 | 1e-10 of the largest value |
| float32 | 1e-5 of the largest value; 1e-6 where the value itself is float64 |
| float16, bfloat16 (autocast counts); float32 where torch may multiply matrices with less | RMSE against a run in \
float64 at most twice the parallel form's own |
| integers, truths | equal (with half precision inside: at most twice as many unequal to the run in float64) |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import fx

from fxfusion.compiler.capture import CapturedGraph
from fxfusion.compiler.observe import Reads, Seen, leaves, made_up, observe, written_inputs
from fxfusion.compiler.pack_values import own, packed_values
from fxfusion.compiler.packing import packing_mode
from fxfusion.errors import VerificationError
from fxfusion.graph import ops
from fxfusion.graph.effects import GraphEffects
from fxfusion.graph.torch_private import FakeTensor
from fxfusion.passes.concatenate import STANDS_FOR
from fxfusion.passes.lift_weights import Pack

WHOLE, CLEAN_UP = "whole graph", "clean-up"
_FLOOR = 1e-6  # of an RMSE: below it float32 accumulators differ
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One comparison. `part`: `"group 0"`, `"mixers 0"`, `"whole graph"` or `"clean-up"`; `group`: the number of the
    group, where it is one. `error` and `limit` are relative (see the module's table); `dtype`: of the values."""

    part: str
    group: int | None
    dtype: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "NOT equal"
        return f"{self.part}: {verdict}, off by {self.error:.2g} of {self.limit:.2g} allowed ({self.dtype})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was compared, and `notes` on what could not be run."""

    rows: tuple[Verification, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), *self.notes]) or "nothing was compared"


@dataclass(frozen=True, slots=True)
class Form:
    """A graph to run, and what its nodes read in place of what it says (`observe`): so the parallel form is the graph
    before anything was fused, with the members of a group reading the group's stream. No pass made it."""

    module: fx.GraphModule
    reads: Reads = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the parallel form that one node of the fused graph stands for. `label`: what errors call it; `end`,
    `nodes`: names of the node that ends it and of those that compute it."""

    label: str
    end: str
    nodes: frozenset[str]
    group: int | None = None


def made_up_inputs(gm: fx.GraphModule, inputs: Sequence[Any], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """By node name, values for the inputs and weights of a graph: floats are random, weights, numbers and integers (ids
    must be in range) those that it was captured with, where they are real."""
    found: dict[str, Any] = dict(weights)
    for name, value in weights.items():
        if value.device.type == "meta" or isinstance(value, FakeTensor):
            raise VerificationError(f"cannot verify: the weight {name} is fake or on the meta device")
    places = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    for name, value in zip(places, inputs, strict=True):
        if name not in weights:
            found[name] = value if _is_kept(value) else made_up(value, name)
    return found


def _is_kept(value: Any) -> bool:
    """Whether an example input serves as it is: a number, ids, a tensor of a kind that cannot be made up."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.device.type == "meta":
        return False
    return value.dim() == 0 or not value.is_floating_point() or type(value) is not torch.Tensor


def packed_tensors(packs: Sequence[Pack], tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The packed weights of a fused graph, by node name."""
    found: dict[str, torch.Tensor] = {}
    for pack in packs:
        sources = [tensors[name] for name in pack.sources]
        with packing_mode(sources):
            made = packed_values(pack.module, sources)
            found |= {name: own(value, sources) for name, value in zip(pack.values, made, strict=True)}
    return found


def prove_rewrite(
    captured: CapturedGraph,
    cleaned: fx.GraphModule,
    parallel: Form,
    fused: fx.GraphModule,
    packs: Sequence[Pack],
    parts: Sequence[Part],
) -> Proof:
    """The captured graph against the cleaned one, the parallel form against the fused graph with its packed weights.

    `parts`: what of the parallel form a node of the fused graph may stand for. Raises `VerificationError`.
    """
    tensors = made_up_inputs(captured.module, captured.inputs, captured.values)
    first = prove(Form(captured.module), cleaned, tensors, CLEAN_UP)
    by_end = {part.end: part for part in parts}
    ends = {node.name: node.meta.get(STANDS_FOR, node.name) for node in fused.graph.nodes}
    found = {name: by_end[end] for name, end in ends.items() if end in by_end}
    second = prove(parallel, fused, tensors | packed_tensors(packs, tensors), WHOLE, found)
    return Proof(rows=(*second.rows, *first.rows), notes=tuple(dict.fromkeys((*first.notes, *second.notes))))


def prove(
    form: Form,
    after: fx.GraphModule,
    tensors: Mapping[str, Any],
    what: str,
    parts: Mapping[str, Part] | None = None,
) -> Proof:
    """Compare two graphs; `tensors` holds values for all inputs and weights of both.

    `parts`: of `before`, by the name of the node of `after` that stands for their end. Raises `VerificationError` that
    names the part, output, input or effect that differs.
    """
    before, reads = form.module, form.reads
    _check_effects(before.graph, after.graph, what)
    parts = parts or {}
    written = (written_inputs(before.graph) | written_inputs(after.graph)) & tensors.keys()
    ends = {part.end: part.label for part in parts.values()}
    one = observe(before, tensors, reads=reads, written=written, watch=ends, seed=0)
    watch = {node: part.label for node, part in parts.items()}
    other = observe(after, tensors, written=written, watch=watch, like=one, seed=0)
    for name, why in other.not_run.items():
        if name not in one.not_run:
            raise VerificationError(
                f"{what}: {name} does not run, and there is no such fault before the rewrite: {why}"
            )
    truth = cache(
        lambda: observe(before, tensors, reads=reads, written=written, watch=ends, like=one, exact=True, seed=0)
    )
    found = Comparison(one, other, truth)
    rows = [
        found.of(part.label, [part.label], lowest_bits(before.graph, part.nodes), part.group)
        for part in parts.values()
        if part.label in one.values
    ]
    rest = dict.fromkeys(name for seen in (one, other) for name in seen.values if name not in ends.values())
    rows.append(found.of(what, list(rest), lowest_bits(before.graph)))
    apart = [label for label in ends.values() if label not in one.values]
    inside = f"verify: {', '.join(apart)}: inside a transform of functorch, so compared by what the whole graph shows"
    return Proof(rows=tuple(rows), notes=(*_notes(one), *([inside] if apart else [])))


def lowest_bits(graph: fx.Graph, names: Collection[str] | None = None) -> int:
    """Bits of the narrowest float that nodes (all of them without `names`) read or compute, as the capture saw it."""
    nodes = [node for node in graph.nodes if names is None or node.name in names]
    values = (
        value
        for node in dict.fromkeys(each for node in nodes for each in (*node.all_input_nodes, node))
        for value in leaves(ops.example(node))
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    )
    return min((torch.finfo(value.dtype).bits for value in values), default=64)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of what two runs showed. `truth`: makes the run of the first graph in float64, where it is needed."""

    one: Seen
    other: Seen
    truth: Callable[[], Seen]

    def of(self, part: str, names: Sequence[str], bits: int, group: int | None = None) -> Verification:
        """Compare the values of these names, `bits` being those of the narrowest float inside; the worst is returned.

        Raises `VerificationError` where they differ by more than is allowed.
        """
        found: list[Verification] = []
        for name in names:
            before, after = self.one.values.get(name), self.other.values.get(name)
            error, limit = _difference(before, after, partial(self._true, name), bits)
            dtype = str(getattr(before, "dtype", type(before).__name__)).removeprefix("torch.")
            if not error <= limit:  # NaN
                where = part if name == part else f"{part}: {name}"
                raise VerificationError(
                    f"{where} differs from the parallel form by {error:.3g}, allowed {limit:.3g} ({dtype})"
                )
            found.append(Verification(part=part, group=group, dtype=dtype, error=error, limit=limit))
        nothing = Verification(part=part, group=group, dtype="", error=0.0, limit=0.0)
        return max(found, key=lambda each: (each.error / (each.limit or 1.0), each.limit), default=nothing)

    def _true(self, name: str) -> Any:
        truth = self.truth()
        for node, why in truth.not_run.items():
            if node not in self.one.not_run:
                raise VerificationError(f"cannot verify: {node} does not run in float64: {why}")
        return truth.values[name]


def _difference(before: Any, after: Any, truth: Callable[[], Any], bits: int) -> tuple[float, float]:
    """The error and its limit."""
    wrong = (float("inf"), 0.0)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return (0.0, 0.0) if type(before) is type(after) and before == after else wrong
    if before.shape != after.shape or before.dtype != after.dtype:
        return wrong
    half = bits < 32 or (bits == 32 and torch.get_float32_matmul_precision() != "highest")
    if before.is_complex():
        before, after, exact = map(torch.view_as_real, (before, after, truth() if half else before))
        return _difference(before, after, lambda: exact, bits)
    if not before.is_floating_point():
        unequal = float((before != after).double().mean()) if before.numel() else 0.0
        if not (unequal and half):
            return unequal, 0.0
        return float((after != truth()).double().mean()), 2.0 * float((before != truth()).double().mean())
    narrow = before.dtype == torch.float64 and bits < 64
    limit = 1e-6 if narrow else 1e-10 if before.dtype == torch.float64 else 1e-5
    one, other = before.double(), after.double()
    finite = one.isfinite()
    if not bool(torch.where(finite, other.isfinite(), (one == other) | (one.isnan() & other.isnan())).all()):
        return wrong
    one, other = one[finite], other[finite]
    if half:
        return _rmse_rule(one, other, lambda: truth()[finite].double())
    scale = float(one.abs().max()) if one.numel() else 1.0
    return (float((one - other).abs().max()) / max(scale, 1e-30) if one.numel() else 0.0), limit


def _rmse_rule(one: torch.Tensor, other: torch.Tensor, truth: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """The error of `other` against a run in float64, and twice that of `one`."""
    if torch.equal(one, other):
        return 0.0, _FLOOR
    exact = truth()
    scale = float(exact.pow(2).mean().sqrt()) or 1.0
    own, error = (float((value - exact).pow(2).mean().sqrt()) / scale for value in (one, other))
    return error, 2.0 * own + _FLOOR


def _check_effects(before: fx.Graph, after: fx.Graph, what: str) -> None:
    """The effects that can be seen from outside are the same ones, in the same order."""
    old, new = ([node.name for node in GraphEffects(graph).observable()] for graph in (before, after))
    if old != new:
        place = next((place for place, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), -1)
        pair = [names[place] if 0 <= place < len(names) else "nothing more" for names in (old, new)]
        raise VerificationError(f"{what}: effect {place} was {pair[0]} and is {pair[1]}; {len(old)} became {len(new)}")


def _notes(seen: Seen) -> list[str]:
    """What the proof did not see."""
    notes = []
    why = list(dict.fromkeys(seen.not_run.values()))
    if why:
        more = f" and {len(why) - _SHOWN} more" if len(why) > _SHOWN else ""
        notes.append(
            f"verify: {len(seen.not_run)} operation{'s'[: len(seen.not_run) > 1]} not run; both graphs got the same "
            f"made-up results, and what was read was compared: {'; '.join(why[:_SHOWN])}{more}"
        )
    blank = [name for name, value in seen.values.items() if _has_no_finite_value(value)]
    if blank:
        notes.append(f"verify: {', '.join(blank[:_SHOWN])}: no finite value, so nothing but that could be compared")
    return notes


def _has_no_finite_value(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return False
    return not bool(value.double().isfinite().any())
