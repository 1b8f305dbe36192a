"""`refit`: a fused model's last linear layers, fitted in closed form so that its stream is again the reference's.

Before:  x + sum of members: the stream after a group is off, and so is all that follows
After:   the down projection of each group (of a wide block, the output projection of its attention too), and the last
         projection of each later FFN and attention, is the one that brings the stream nearest to the reference's on
         calibration text; shapes and speed stay

    W = argmin ||H W^T - D||^2 + penalty ||W - W0||^2
    H: inputs of the projection; D: the reference's stream after the group less what stands before it now

An approximation: its quality is measured on held-out text, layer by layer.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import Batch, model_device
from fxfusion.analysis.quality import evaluate
from fxfusion.analysis.store import Store, inside, model_key
from fxfusion.checkpoints.quantised import linear_layers
from fxfusion.errors import OptionError, SurgeryError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_record import dropped_since, fused_entry, read_record, read_refit, write_refit
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.models.ffn_surgery.unfuse import unfused_tensors
from fxfusion.models.fingerprint import check_fits, facts_of
from fxfusion.models.traced import TracedModel
from fxfusion.models.weight_grid import WeightGrid
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.record import LayerFit, Refit
from fxfusion.recovery.fit import PENALTIES, Fitted, Fitter, Listener, check_penalties
from fxfusion.recovery.gram import limit_or_half
from fxfusion.recovery.inputs import InputFitter, check_memory
from fxfusion.recovery.projections import Projection, choose, find_projections, linears_of
from fxfusion.recovery.readers import Reader, choose_readers, find_readers
from fxfusion.recovery.streams import Streams
from fxfusion.recovery.texts import Texts
from fxfusion.report.progress import reporting

Model = TypeVar("Model", bound=nn.Module)
Step = Projection | Reader
REFERENCES, LATER, SIDES = ("unfused", "intact"), ("none", "ffn", "all"), ("out", "both")


def refit(
    model: Model,
    plan: Any,
    batches: Iterable[Batch],
    reference: str = "intact",
    *,
    validation: Iterable[Batch] | None = None,
    later: str = "all",
    sides: str = "both",
    penalties: Sequence[float] = PENALTIES,
    grid: str | None = None,
    memory_limit: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    on_layer: Listener | None = None,
) -> Model:
    """A fused copy of a model whose projections into the residual stream are refitted, in closed form, to a reference.

    Args:
        model: the model as it was loaded, with all its attention and FFNs (for `reference="unfused"` attention may be
            dropped already). It stays as it is.
        plan: a `FusionPlan`, a dict of its fields, or a plan file: what is dropped and fused. A plan may only drop, or
            only remove layers.
        batches: calibration text, `input_ids` `[batch, seq]` or dicts of model inputs. At least four tokens for each
            channel of the widest FFN are good, some 50,000 to 100,000 better.
        reference: "intact": the stream of the model as it was, so that dropped attention is made up for too;
            "unfused": that of the model with the attention dropped and the layers removed, and nothing fused.
        validation: text that decides on penalties and on what is kept; by default an eighth of `batches`.
        later: what is refitted beside the groups, from the first layer that was changed on (and the FFN before layers
            that were removed, which then stands in for them): "none", "ffn" (the down projection of every FFN) or "all"
            (the output projection of every attention too). The attention of a wide block belongs to its group.
        sides: "both": the layers that read the stream first (gate and up; q, k and v) are fitted too, to what they
            would have read in the reference, each block's before its last layer; "out": last layers alone.
        penalties: ridge penalties to choose from, as parts of the mean diagonal of the Gram matrix.
        grid: "int4:GROUP" or "int8:GROUP": round what is fitted to the grid of a weight-only quantisation with groups
            of so many inputs, each weight making up for the rounding of those before it (GPTQ, arXiv 2210.17323, on the
            sums of the fit). Every layer that `later` names is, from the first of the model on; linear layers that are
            not fitted are rounded to the nearest, as the export that quantises so, or GGUF's q4_0 for "int4:32", would:
            it then changes nothing. What is fitted is compared with the nearest values, too.
        memory_limit: bytes beside the models and a forward pass, half of the free memory by default. A layer of `w`
            inputs and `d` outputs takes `24 w^2 + (8 + 16 len(penalties)) w d + 4096 w`; where that is more than three
            quarters of the limit, it is solved in parts. The rest keeps streams between layers, if they fit.
        cache: a folder where each finished layer is kept; the same call goes on from there.
        progress: say how far it is, on the error stream.
        on_layer: called with each projection and what came of it.

    Returns:
        A new model, fused and refitted. Its `config.fxfusion["refit"]` says what was done (fields of
        `fxfusion.plan.record.Refit`); a saved folder's plan and card do too. A layer is left as
        it was where no penalty brings it nearer on the text for validation; all are, with a warning, where the loss
        there does not improve.

    Raises:
        OptionError: a bad option; text that is too short, or that the intact model cannot predict (noise); a cache
            folder of another refit; a memory limit in which nothing can be solved; a layer whose inputs are no whole
            groups of the grid.
        PlanError: the plan is for another model, or neither drops nor fuses.
        SurgeryError: the model is fused or refitted already, has adapters, or cannot be fused so.
        FxFusionError: an activation is not finite; the message names batch and layer.
    """
    bare, chosen = bare_model(model), FusionPlan.resolve(plan).replace(refit=None)
    _check(model, bare, chosen, reference, later, sides)
    known, on = check_penalties(penalties), None if grid is None else WeightGrid.parse(grid)
    texts = Texts.of(batches, validation)
    limit = limit_or_half(memory_limit, model_device(bare) or torch.device("cpu"))
    vocabulary = facts_of(bare, values=False).vocabulary
    if vocabulary is not None and read_record(getattr(bare, "config", None)) is None:
        texts.check_language(bare, vocabulary)
    how = _How(reference=reference, later=later, sides=sides, penalties=known, grid=on, limit=limit)
    work = _Work(source=bare, plan=chosen, texts=texts, how=how)
    work.run(cache, progress, on_layer)
    return cast(Model, work.model)


def _check(model: nn.Module, bare: nn.Module, plan: FusionPlan, reference: str, later: str, sides: str) -> None:
    for value, known, name in ((reference, REFERENCES, "reference"), (later, LATER, "later"), (sides, SIDES, "sides")):
        if value not in known:
            raise OptionError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    config = getattr(bare, "config", None)
    if read_refit(config) is not None:
        raise SurgeryError("the model was refitted already: start from the model as it was loaded")
    if fused_entry(config) is not None:
        raise SurgeryError("the model is fused already: give the model as it was loaded, and the plan")
    dropped = dropped_since(config)
    if dropped and reference == "intact":
        raise SurgeryError(
            f"the attention of layers {dropped} was dropped, so there is no intact model to refit to: "
            'give the model as it was loaded, or reference="unfused"'
        )
    if not plan.groups and (plan.changes_nothing or reference != "intact" or later == "none"):
        raise OptionError(
            "plan: it fuses nothing, so there is nothing to refit (a plan that only drops attention or removes layers "
            'can be refitted with reference="intact" and later="ffn" or "all")'
        )
    if bare is not getattr(model, "_orig_mod", model):
        raise SurgeryError("the model has adapters: merge them first (`merge_and_unload`)")
    check_fits(plan, bare)


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What a caller chose, checked. See `refit`."""

    reference: str
    later: str
    sides: str
    penalties: tuple[float, ...]
    grid: WeightGrid | None
    limit: int

    @property
    def room(self) -> int:
        """Bytes for the kept streams of each of the two texts."""
        return self.limit // 8


class _Work:
    """One refit. `model`: the copy that is fused and changed; its parameters before that are kept to go back to."""

    def __init__(self, *, source: nn.Module, plan: FusionPlan, texts: Texts, how: _How) -> None:
        self.source, self.plan, self.texts, self.how = source, plan, texts, how
        self.model: Any = fuse(copy.deepcopy(source), plan)
        self.model.eval()
        self.traced = TracedModel(self.model)
        gone, removed = ([], ()) if how.reference == "intact" else (self._missing(), plan.removed)
        self.reference = TracedModel(source, gone, removed)

    def run(self, cache: str | os.PathLike[str] | None, progress: bool, on_layer: Listener | None) -> None:
        steps = self._steps()
        self.texts.check_width(max(one.width for one in steps if isinstance(one, Projection)), "the widest layer")
        store = Store(inside(cache, "refit.json"), "a refit that was stopped", lambda: self._facts(steps))
        old = {name: value.detach().clone() for name, value in self._parameters(*steps).items()}
        old |= self._round(steps)
        before = float(evaluate(self.model, self.texts.decide_given, resamples=100).loss)
        fits = self._known(store, steps)
        with reporting(progress, "refit", sum(map(self._passes, steps[len(fits) :]))) as advance:
            ticks = _Ticks(advance)
            fitters = self._fitters(ticks.tick, old)
            for step in steps[len(fits) :]:
                with ticks.at_most(self._passes(step)):
                    fitted = fitters[type(step)].fit(step)
                self._keep(store, step, fitted)
                fits.append(fitted)
                if on_layer is not None:
                    on_layer(step, fitted)
        self._finish(steps, fits, before, old)

    @torch.no_grad()
    def _round(self, steps: Sequence[Step]) -> dict[str, Tensor]:
        """Put on the grid what an export puts there, as it does: that is what a fit must improve on, and what stays of
        layers that are not fitted. Returns what the weights were."""
        old = {}
        for name, own in self._on_grid(steps).items():
            old[name] = self.model.get_parameter(name).detach().clone()
            own.copy_(cast(WeightGrid, self.how.grid).nearest(own))
        return old

    def _on_grid(self, steps: Sequence[Step]) -> dict[str, Tensor]:
        """The weights that go there, `[outputs, inputs]`: views, by their names."""
        if self.how.grid is None:
            return {}
        found = {f"{name}.weight": one.weight.detach() for name, one in linear_layers(self.model).items()}
        for step in steps:
            for name, value in self._parameters(step).items():
                if value.dim() == 2:
                    found[name] = value.detach().t() if _is_transposed(step, name) else value.detach()
        return found

    def _passes(self, step: Step) -> int:
        """Over how many batches a step goes, about: what it tries depends on what it finds."""
        fit, decide = len(self.texts.fit), len(self.texts.decide)
        return fit + decide * (1 if isinstance(step, Projection) else 2 + (len(self.how.penalties) > 1))

    def _known(self, store: Store, steps: Sequence[Step]) -> list[Fitted]:
        """What an earlier call found, put into the model. Raises `OptionError` where it is broken or does not fit."""
        found = []
        try:
            for step, entry in zip(steps, store.data.get("done", []), strict=False):
                found.append(Fitted(**entry["fitted"]))
                own = self._parameters(step) if found[-1].applied else {}
                kept = store.tensors(entry["kept"], like=own) if own else {}
                with torch.no_grad():
                    for name, value in own.items():
                        value.copy_(kept[name])
        except (KeyError, TypeError) as error:
            raise store.broken(repr(error)) from error
        return found

    def _keep(self, store: Store, step: Step, fitted: Fitted) -> None:
        """Write down what became of a step, with its new parameters."""
        kept = store.keep(self._parameters(step)) if fitted.applied else None
        store.data.setdefault("done", []).append({"fitted": asdict(fitted), "kept": kept})
        store.save()

    def _parameters(self, *steps: Step) -> dict[str, Tensor]:
        names = [name for step in steps for name in step.parameters]
        return {name: self.model.get_parameter(name) for name in names}

    def _steps(self) -> list[Step]:
        """What is refitted, in order: of each block what reads the stream, then what adds to it."""
        state = fused_state(self.model)
        recipe = None if state is None else state.recipe
        graph = self.traced.graph(self.texts.fit[0].inputs)
        is_intact = self.how.reference == "intact"
        found = find_projections(self.model, graph, recipe, has_removed=is_intact)
        gone = (*self.plan.dropped_attention, *self.plan.removed) if is_intact else ()
        chosen = choose(found, gone, self.how.later, everywhere=self.how.grid is not None)
        if not chosen:
            raise SurgeryError("no linear layer of the model that could be refitted was found")
        readers: list[Reader] = []
        if self.how.sides == "both":
            reference = self.reference.graph(self.texts.fit[0].inputs)
            known = find_readers(self.model, graph, recipe, linears_of(self.source, reference), chosen)
            readers = choose_readers(known, chosen, chosen[0].layer, self.how.later)
            tried = len(self.how.penalties) + (0 if self.how.grid is None else 1)
            check_memory(readers, tried, self.how.limit - 2 * self.how.room)
        steps: list[Step] = sorted([*readers, *chosen], key=lambda one: (one.place, isinstance(one, Projection)))
        for name, value in self._parameters(*steps).items():
            if type(value.detach()) is not Tensor or not value.is_floating_point():
                raise SurgeryError(f"{name} is quantised or sharded: refit before that")
        for name, value in self._on_grid(steps).items():
            cast(WeightGrid, self.how.grid).check(name.removesuffix(".weight"), value.shape[1], value.dtype)
        return steps

    def _fitters(self, advance: Any, exact: dict[str, Tensor]) -> dict[type, Any]:
        """By what they fit. `exact`: parameters before they were rounded."""
        on: dict[str, Any] = {} if self.how.grid is None else {"grid": self.how.grid, "exact": exact}
        calibration, validation = (
            Streams(self.traced, self.reference, batches, self.how.room, advance)
            for batches in (self.texts.fit, self.texts.decide)
        )
        out = Fitter(
            model=self.model,
            calibration=calibration,
            validation=validation,
            limit=self.how.limit - 2 * self.how.room,
            penalties=self.how.penalties,
            **on,
        )
        into = InputFitter(
            model=self.model,
            source=self.source,
            calibration=calibration,
            validation=validation,
            penalties=self.how.penalties,
            **on,
        )
        return {Projection: out, Reader: into}

    def _missing(self) -> list[int]:
        record = read_record(getattr(self.source, "config", None))
        gone = () if record is None else record.dropped_attention
        return [layer for layer in self.plan.dropped_attention if layer not in gone]

    def _facts(self, steps: Sequence[Step]) -> dict[str, Any]:
        return {
            "model": model_key(TracedModel(self.source)),
            "dropped_attention": list(self.plan.dropped_attention),
            "groups": [group.to_data() for group in self.plan.groups],
            "norm": self.plan.norm,
            **({"removed": list(self.plan.removed)} if self.plan.removed else {}),
            **({} if self.how.grid is None else {"grid": str(self.how.grid)}),
            "reference": self.how.reference,
            "layers": [one.name for one in steps],
            "penalties": list(self.how.penalties),
            "text": self.texts.fingerprint,
        }

    def _finish(self, steps: Sequence[Step], fits: list[Fitted], before: float, old: dict[str, Tensor]) -> None:
        after = float(evaluate(self.model, self.texts.decide_given, resamples=100).loss)
        applied = any(fit.applied for fit in fits)
        if applied and not after < before:
            warnings.warn(
                f"the refit is not applied: the loss on the text for validation would be {after:.4g} after it, "
                f"{before:.4g} before it",
                stacklevel=4,
            )
            with torch.no_grad():
                for name, value in old.items():
                    self.model.get_parameter(name).copy_(value)
        kept = applied and after < before
        record = Refit(
            reference=cast(Any, self.how.reference),
            later=cast(Any, self.how.later),
            sides=cast(Any, self.how.sides),
            grid=None if self.how.grid is None else str(self.how.grid),
            tokens=self.texts.tokens,
            held_out_tokens=sum(int(batch.seen.sum()) for batch in self.texts.decide),
            fingerprint=self.texts.fingerprint,
            loss_before=before,
            loss_after=after if kept else before,
            fits=tuple(
                layer_fit for one, fit in zip(steps, fits, strict=True) for layer_fit in _layer_fits(one, fit, kept)
            ),
        )
        write_refit(self.model.config, record)


class _Ticks:
    """Progress by batches, of steps that may need fewer or more of them than is known before."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._left = advance, 0

    def tick(self, count: int) -> None:
        shown = min(count, self._left)
        self._left -= shown
        self._advance(shown)

    @contextmanager
    def at_most(self, count: int) -> Iterator[None]:
        """One step: it counts as so many in the end."""
        self._left = count
        yield
        self.tick(self._left)


def _is_transposed(step: Step, name: str) -> bool:
    parts = [step] if isinstance(step, Projection) else step.parts
    return any(part.transposed for part in parts if part.weight == name)


def _layer_fits(step: Step, fitted: Fitted, kept: bool) -> Iterator[LayerFit]:
    """One for each linear layer."""
    for name in [step.name] if isinstance(step, Projection) else step.linears:
        yield LayerFit(
            name=name,
            layers=step.members or (step.layer,),
            penalty=fitted.penalty,
            before=fitted.before,
            after=fitted.after if kept else fitted.before,
            applied=fitted.applied and kept,
            side="out" if isinstance(step, Projection) else "in",
        )


def refitted_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a refit changed, by the names and in the shapes of the model as it was loaded, one after the other.

    model.layers.4.mlp.down_proj of a fused group 4 5 6  ->  ...4.mlp.down_proj.weight, ...5..., ...6...

    Put into the model as it was loaded, these values make what fuses to this one.

    Raises `SurgeryError` where the model was not refitted.
    """
    bare = bare_model(model)
    record = read_refit(getattr(bare, "config", None))
    if record is None:
        raise SurgeryError("the model was not refitted")
    names = _names(bare, tuple(fit.name for fit in record.fits if fit.applied))
    for name, value in unfused_tensors(bare):
        if name in names:
            yield name, value


def _names(model: nn.Module, layers: tuple[str, ...]) -> set[str]:
    state = fused_state(model)
    own = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{one}." for one in layers))}
    own |= {name for name, _ in model.named_parameters() if name in layers}
    if state is None:
        return own
    found = {state.recipe.unfused_name(name) for name in own}
    for group in state.recipe.parts:
        for number, home in enumerate(group.home.matrices):
            if home.weight in found:
                members = [member.matrices[number] for member in group.members]
                found |= {name for matrix in members for name in (matrix.weight, matrix.bias) if name is not None}
        if any(home.weight in found for home in group.home.projections):  # gains of zero, say, that became ones
            found |= {name for member in group.members for name in member.small}
    return found
