"""`fuse`: groups of FFNs become one wider FFN each, in a model's own modules, in place.

Before:  layers 4 5 6 7, each x + ffn(norm(x)), no attention between their FFNs
After:   layer 4 alone, its FFN as wide as all four; layers 5 6 7 are gone, config and cache follow

Before:  a window of layers 4 5, which keep their attention (the plan says mixers: hoist)
After:   layer 4 with attention alone, layer 5 with its own attention and an FFN as wide as both
         mixers: wide: layer 5 alone, its attention with the heads of both, its FFN as wide as both

Before:  a layer that the plan removes
After:   it is gone, attention and FFN, its weights with it

Exact relative to the parallel form of the groups (arXiv 2503.18908, theorem 3.1); that form is an approximation of
the model. Members are freed group by group.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fxfusion.compiler.unwrap import offloaded
from fxfusion.errors import CaptureError, OptionError, PlanError, SurgeryError
from fxfusion.models.adapters.carrier import AdapterMode, Adapters
from fxfusion.models.attention_sites import find_sites
from fxfusion.models.attention_surgery import run_once
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_attention import drop_traced
from fxfusion.models.drop_record import fused_entry, read_record
from fxfusion.models.ffn_surgery.depth import DepthEditor
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.heads import put_heads
from fxfusion.models.ffn_surgery.layout import Tensors
from fxfusion.models.ffn_surgery.proof import ParallelForm, check_heads, check_widths
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.ffn_surgery.record import FusedState, set_fused_state, write_entry
from fxfusion.models.ffn_surgery.residue import Residue, residue_of
from fxfusion.models.ffn_surgery.stubs import FfnStubs
from fxfusion.models.ffn_surgery.unfuse import give_back
from fxfusion.models.ffn_surgery.widen import empty, set_parameter, set_width, tensor_of
from fxfusion.models.fingerprint import check_fits
from fxfusion.models.plain_save import warn_of_plain_save
from fxfusion.models.surgery_proof import CacheProof, proof_tokens
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.plan.fusion_plan import FusionPlan

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, plan: Any, *, check: bool = True, shards: int = 1, adapters: AdapterMode = "carry") -> Model:
    """Make each group of a plan one FFN, in place: stock modules of the same classes, wider.

    The first member's own modules take the weights of all, the layers of the other members go, and the config and
    the key-value cache follow. In a window (`mixers: hoist`) the other layers stay with their attention, and the FFN of
    the last layer takes the weights; in a wide one they go too, and its attention takes those of theirs. Attention
    that the plan drops is dropped first, where the model still has it; then go the layers that it removes.
    `config.fxfusion` records all; `unfuse` gives the members back, unless layers were removed. Where only layers were
    removed, the model is a plain smaller one, and transformers' own `save_pretrained` writes it as such.

    Args:
        model: a decoder of `transformers` on any device, the meta device included; trainable or not. One that
            `torch.compile` or PEFT wrapped stays wrapped.
        plan: a `FusionPlan`, a dict of its fields, or a plan file. Layers are numbered as in the model as loaded.
        check: prove on a few tokens, group by group, that the logits are those of the parallel form, and that cached
            decoding equals the full computation. On the meta device the FFNs of the changed model are compared.
        shards: order the channels so that each of so many equal parts of a wide FFN holds a slice of every member:
            for tensor parallelism over as many devices. 1: one member after the other. Results do not depend on it.
        adapters: "carry": LoRA adapters of the members become one of the wide FFN, exactly; those of other layers stay,
            those of dropped attention go. Their dropout, in training, is then drawn once for a group. "merge": the
            active adapters go into the weights, of whatever kind they are, and those weights are in memory twice until
            all is proved.

    Returns:
        The same model; where adapters were merged, the one inside of PEFT's. Peak memory is the model and the widest
        group; every freed member is freed at once.

    Raises:
        PlanError: the plan is for another model, or names what cannot be one group.
        SurgeryError: modules cannot hold the result, or a proof fails. The model is then as it was, bit
            for bit; for groups that were finished before, copies are on disk until all is proved (`norm="fold"`).
    """
    bare = bare_model(model)
    if offloaded(bare):
        raise SurgeryError(f"the model cannot be fused: {offloaded(bare)}; load it whole")
    chosen = FusionPlan.resolve(plan)
    if fused_entry(getattr(bare, "config", None)) is not None:
        raise SurgeryError("the model is fused already: `unfuse` it first, then fuse by one plan for all groups")
    if type(shards) is not int or shards < 1:
        raise SurgeryError(f"shards must be a whole number of at least 1, not {shards!r}")
    with ExitStack() as undo:
        taken = Adapters.taken_off(model, bare, adapters, undo)
        check_fits(chosen, bare)
        taken.merge(undo)
        surgery = _prepare(bare, chosen, check, shards, undo)
        gc.collect()  # graphs are full of cycles, and hold the members' weights
        taken.read(surgery.recipe, check)
        if surgery.recipe.changes:
            with surgery.kept:
                surgery.run()
        undo.pop_all()
    result: Any = taken.put_on()
    return cast(Model, result)


def missing_drops(model: nn.Module, plan: FusionPlan) -> list[int]:
    """Layers whose attention the plan drops and the model still has, by its own record."""
    record = read_record(getattr(model, "config", None))
    done = () if record is None else record.dropped_attention
    return [layer for layer in plan.dropped_attention if layer not in done]


def _prepare(model: nn.Module, plan: FusionPlan, check: bool, shards: int, undo: ExitStack) -> _Surgery:
    """Plan the surgery on the intact model's graph, and drop what attention must go; one capture serves both.

    No graph is left behind: it would hold the members' weights.
    """
    ids = proof_tokens(model)
    missing = missing_drops(model, plan)
    traced = TracedModel(model)
    try:
        intact = traced.graph(ids)
        without = TracedModel(traced, missing, plan.removed).graph(ids)
    except CaptureError as error:
        raise SurgeryError(f"{type(model).__name__} cannot be looked into: {error}") from error
    except OptionError as error:
        raise PlanError(f"the plan does not fit this model: {error}") from None
    surgery = _Surgery.plan(model, plan, check, shards, without, ids)
    if missing:
        drop_traced(model, missing, check, intact, undo)
    return surgery


class KeptWeights:
    """The weights of finished groups' members that folding rounds, bit for bit, while later groups may still fail.

    On disk, in the system's folder for temporary files (`TMPDIR` names another): in memory they would take the model's
    weights a second time. A context: its files go with it.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fxfusion_fuse_", ignore_cleanup_errors=True)
        self._files: list[Path] = []

    def __enter__(self) -> KeptWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def keep(self, weights: Tensors) -> None:
        """Write them. Raises `SurgeryError` where the disk does not take them."""
        real = {name: value for name, value in weights.items() if not value.is_meta}
        if not real:
            return
        file = Path(self._folder.name) / f"{len(self._files)}.pt"
        try:
            torch.save(real, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk is full
            raise SurgeryError(
                f"the members' weights cannot be kept on disk until all groups are proved: {error} (norm='last' "
                "needs no copy; TMPDIR names another folder)"
            ) from error
        self._files.append(file)

    def put_back(self, model: nn.Module) -> None:
        """Give the model all that was kept. Its modules are those of before by now."""
        for file in self._files:
            for name, value in torch.load(file).items():
                set_parameter(model, name, value)


@dataclass(slots=True, kw_only=True)
class _Surgery:
    """What was found before anything is changed. `paths`: modules of each surviving attention, by layer. `before`:
    the graph where nothing can be computed (it holds no weights then)."""

    model: Any
    plan_: FusionPlan
    recipe: FuseRecipe
    ids: Tensor
    paths: Mapping[int, Sequence[str]]
    form: ParallelForm | None
    before: TracedGraph | None
    residue: Residue = field(default_factory=dict)
    kept: KeptWeights = field(default_factory=KeptWeights)

    @classmethod
    def plan(
        cls, model: nn.Module, plan: FusionPlan, check: bool, shards: int, traced: TracedGraph, ids: Tensor
    ) -> _Surgery:
        """Find out everything from the graph without the attention that goes."""
        recipe, _ = FuseRecipe.read(model, traced, plan, shards)
        survivors = sorted({block.layer for block in traced.blocks.mixers})
        sites = find_sites(traced, survivors)
        computes = check and not ids.is_meta
        return cls(
            model=model,
            plan_=plan,
            recipe=recipe,
            ids=ids,
            paths={layer: site.attention for layer, site in sites.items()},
            form=ParallelForm.of(traced, plan, ids) if computes else None,
            before=traced if check and ids.is_meta else None,
        )

    def run(self) -> None:
        cache = CacheProof.of(self.model, self.ids) if self.form is not None else None
        mixers = {layer: self._modules(paths) for layer, paths in self.paths.items()}
        stubs = FfnStubs.of(self.model, self.recipe.emptied.values(), self.ids)
        depth = DepthEditor.of(self.model, self.recipe.path, mixers)
        done: list[GroupRecipe] = []
        try:
            self._remove_whole(depth)
            for number, recipe in enumerate(self.recipe.groups):
                self._fuse_group(recipe, depth, stubs, self.recipe.groups[: number + 1])
                done += self.recipe.parts_of(recipe)
            if cache is not None:
                cache.check(self.model)
            elif self.before is not None:
                check_widths(self.model, self.before, self.recipe, self.ids)
        except BaseException:
            give_back(self.model, depth, stubs, depth.changes(), done, self.residue)
            self.kept.put_back(self.model)
            raise
        self._remember(depth, stubs)

    def _remove_whole(self, depth: DepthEditor) -> None:
        """Take out the layers that go as a whole, and prove what is left; they are kept until all is done."""
        if not self.recipe.gone:
            return
        depth.without(self.recipe.gone)
        if self.form is not None:
            self.form.check(self.model, 0)

    def _fuse_group(
        self, recipe: GroupRecipe, depth: DepthEditor, stubs: FfnStubs, groups: Sequence[GroupRecipe]
    ) -> None:
        """Widen the home's FFN, take the others out, with their layers unless these keep their attention, prove it,
        and only then let their weights go."""
        depth.put(depth.layers)  # names are those of the model with all its layers
        parts = self.recipe.parts_of(recipe)
        old = {name: tensor_of(self.model, name) for part in parts for name in part.reads}
        home = {name: tensor_of(self.model, name) for part in parts for name in part.writes}
        given = {name: value for name, value in old.items() if value is not None}
        try:
            for name, value in (pair for part in parts for pair in part.pack(given)):
                set_parameter(self.model, name, value)
            layer_path = f"{self.recipe.path}.{recipe.home.layer}"
            set_width(self.model, recipe.home, layer_path, recipe.home.width, recipe.width)
            for part in parts:
                self.residue |= residue_of(part, given)
            gone = self._take_out(recipe, depth, stubs, groups)
            if self.plan_.norm == "fold":
                self.kept.keep(given)
        except BaseException:
            depth.put(depth.layers)
            for name, before in home.items():
                set_parameter(self.model, name, before)
            raise
        for module in gone:
            empty(module)

    def _take_out(
        self, recipe: GroupRecipe, depth: DepthEditor, stubs: FfnStubs, groups: Sequence[GroupRecipe]
    ) -> list[nn.Module]:
        """What held the other members, taken out of the model, which is proved then."""
        layers = [*self.recipe.gone, *(layer for group in groups for layer in group.removed)]

        def prove() -> None:
            try:
                if layers:
                    depth.without(layers)
                self._prove(recipe, groups)
            except BaseException:
                depth.put(depth.layers)  # what is tried next has names of the model with all its layers
                raise

        if recipe.mixers != "hoist":
            self._prove_heads(recipe, depth, prove)
            return [depth.layers[layer] for layer in recipe.removed]
        sites = [self.recipe.emptied[member.layer] for member in recipe.members[1:]]
        names = [(*member.large, *member.small) for member in recipe.members[1:]]
        moved = {site.ffn: own for site, own in zip(sites, names, strict=True)}
        stubs.put(sites, moved, prove)
        return [stubs.gone[path] for site in sites for path in site.paths]

    def _prove(self, recipe: GroupRecipe, groups: Sequence[GroupRecipe]) -> None:
        if self.form is not None:
            self.form.check(self.model, len(groups))
        elif recipe.mixers == "wide":
            check_heads(self.model, self.recipe, groups, self.ids)
        elif recipe.is_window and self.ids.is_meta:
            TracedModel(self.model).graph(self.ids)  # raises where the stand-ins do not fit
        elif recipe.is_window:
            run_once(self.model, self.ids)

    def _prove_heads(self, recipe: GroupRecipe, depth: DepthEditor, prove: Callable[[], object]) -> None:
        """Prove a group, and let a wide attention, where it has one, know its heads."""
        _, *attention = self.recipe.parts_of(recipe)
        if not attention:
            prove()
            return
        modules = self._modules(self.paths[attention[0].home.layer])
        put_heads(attention[0], modules, self.model, prove)

    def _remember(self, depth: DepthEditor, stubs: FfnStubs) -> None:
        state = FusedState(
            recipe=self.recipe,
            plan=self.plan_,
            shells={layer: depth.layers[layer] for group in self.recipe.groups for layer in group.removed},
            parts=stubs.gone,
            residue=self.residue,
            changes=depth.changes(),
        )
        set_fused_state(self.model, state)
        write_entry(self.model.config, self.recipe, self.plan_.norm)
        warn_of_plain_save(self.model)

    def _modules(self, paths: Sequence[str]) -> list[nn.Module]:
        return [module for path in paths for module in self.model.get_submodule(path).modules()]
