"""What a plan does to a model's parameters, by name: which become wide ones, which go, which only change layer.

    model, plan  ->  FuseRecipe: groups, attentions that are joined, layers that go, new number of each that stays

Works on the meta device, so the parameters of a checkpoint can be fused while they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fxfusion.compiler.pipeline import analyse
from fxfusion.errors import PlanError, Refusal, RefusalCode, SurgeryError
from fxfusion.graph.torch_private import hooks_in
from fxfusion.models.attention_sites import layer_list_path
from fxfusion.models.drop_record import read_record
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.quantised import FUSE_FIRST, common_block, is_quantised, kind_of
from fxfusion.models.ffn_surgery.read_attention import (
    attention_recipe,
    check_parameters,
    check_wide_layers,
    wide_mixers,
)
from fxfusion.models.ffn_surgery.read_layout import LayoutReader
from fxfusion.models.ffn_surgery.stubs import FfnSite, find_ffn_sites
from fxfusion.models.surgery_proof import proof_tokens
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.passes.ffn import Group
from fxfusion.plan.fusion_plan import FusionPlan

_LEAST_BLOCK = 16  # smaller blocks would need more room for scales than they save


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseRecipe:
    """All names are those of the unfused model. `groups`: the FFNs of each group of the plan; `attentions`: those of
    wide windows, by the layer that keeps them. `path`: of the list of decoder layers; `count`: how many there are;
    `emptied`: the modules that go in layers that stay without their FFN, by layer; `gone`: layers that go whole."""

    groups: tuple[GroupRecipe, ...]
    path: str
    count: int
    emptied: Mapping[int, FfnSite] = field(default_factory=dict)
    attentions: Mapping[int, GroupRecipe] = field(default_factory=dict)
    gone: tuple[int, ...] = ()
    _moved: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inner = (member for group in self.groups if group.mixers == "hoist" for member in group.members[1:])
        object.__setattr__(self, "_moved", frozenset(name for m in inner for name in (*m.large, *m.small)))

    @classmethod
    def of(cls, model: nn.Module, plan: FusionPlan, shards: int = 1) -> FuseRecipe:
        """Read the recipe off a model, on any device, that may still have the attention which the plan drops.
        `shards`: see `fuse`.

        Raises `PlanError` where the plan does not fit the model, `SurgeryError` where modules cannot hold the result.
        """
        dropped = [layer for layer in plan.dropped_attention if has_mixer(model, layer)]
        traced = TracedModel(model, dropped, plan.removed).graph(proof_tokens(model))
        return cls.read(model, traced, plan, shards)[0]

    @classmethod
    def read(
        cls, model: nn.Module, traced: TracedGraph, plan: FusionPlan, shards: int = 1
    ) -> tuple[FuseRecipe, tuple[Group, ...]]:
        """The same from the graph of the model without what the plan drops and removes; with the graph's groups."""
        found = analyse(traced.captured, plan)
        unmet = [
            refusal.message
            for refusal in found.refusals
            if refusal.code in (RefusalCode.PLAN_UNMATCHED, RefusalCode.PLAN_ABSENT)
        ]
        if unmet or len(found.groups) < len(plan.groups):
            _refuse_opaque(found.refusals, plan, model)
            raise PlanError(f"the plan does not fit this model: {'; '.join(unmet) or 'it has no FFN'}")
        path = layer_list_path(traced)
        count = len(list(model.get_submodule(path).children()))
        reader = LayoutReader.of(model, traced)
        mixers = [wide_mixers(group, found.matches, traced) for group in found.groups]
        chosen = [_home_first(group, list(own), traced) for group, own in zip(found.groups, mixers, strict=True)]
        read = (reader.recipe(group, _layers_of(group, traced)) for group in chosen)
        groups = tuple(replace(group, shards=shards) for group in read)
        joined = [own for own in mixers if len(own) > 1]
        attentions = {[*own][-1]: attention_recipe(reader, own) for own in joined}
        inner = [member for group in groups if group.mixers == "hoist" for member in group.members[1:]]
        sites = find_ffn_sites(traced, path, inner) if inner else ()
        emptied = {member.layer: site for member, site in zip(inner, sites, strict=True)}
        recipe = cls(groups=groups, path=path, count=count, emptied=emptied, attentions=attentions, gone=plan.removed)
        recipe._check_layers(traced)
        for group in groups:
            if len(parts := recipe.parts_of(group)) > 1:
                check_wide_layers(model, parts[1], traced, path, count)
                check_parameters(model, parts, path)
        recipe._check_hooks(model)
        recipe._check_shards(shards)
        for group in recipe.parts:
            _check_quantised(group, {name: reader.tensor(name) for name in group.reads})
        return recipe, found.groups

    @property
    def parts(self) -> tuple[GroupRecipe, ...]:
        """All that becomes wider: FFNs, then attentions."""
        return (*self.groups, *self.attentions.values())

    def parts_of(self, group: GroupRecipe) -> tuple[GroupRecipe, ...]:
        """A group's FFN, and the attention of its window where that is wide."""
        own = self.attentions.get(group.home.layer) if group.mixers == "wide" else None
        return (group,) if own is None else (group, own)

    @property
    def removed(self) -> tuple[int, ...]:
        """Layers that go: those of every member but the first of its group, none of a hoisted window's; and `gone`."""
        return tuple(sorted([*self.gone, *(layer for group in self.groups for layer in group.removed)]))

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.groups or self.gone)

    @property
    def shards(self) -> int:
        """See `fuse`."""
        return self.groups[0].shards if self.groups else 1

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers that stay, in order: the number of each in the fused model is its place here."""
        gone = set(self.removed)
        return tuple(layer for layer in range(self.count) if layer not in gone)

    def fused_name(self, name: str) -> str | None:
        """The name of a parameter in the fused model; None where its layer or its FFN goes."""
        if name in self._moved:
            return None
        layer, rest = self._split(name)
        if layer is None:
            return name
        return None if layer in self.removed else f"{self.path}.{self.kept.index(layer)}.{rest}"

    def unfused_name(self, name: str) -> str:
        """The name that a parameter of the fused model has in the unfused one."""
        place, rest = self._split(name)
        return name if place is None else f"{self.path}.{self.kept[place]}.{rest}"

    def renamed(self, names: Iterable[str]) -> dict[str, str]:
        """For names of the unfused model that stay as they are: the fused model's name of each -> its own."""
        written = {name for part in self.parts for name in part.writes}
        pairs = [(self.fused_name(name), name) for name in names if name not in written]
        return {new: old for new, old in pairs if new is not None}

    def _split(self, name: str) -> tuple[int | None, str]:
        start = f"{self.path}." if self.path else ""
        head, _, rest = name.removeprefix(start).partition(".")
        return (int(head), rest) if name.startswith(start) and head.isdigit() else (None, name)

    def _check_hooks(self, model: nn.Module) -> None:
        """Hooks on a layer that goes would go with it, unsaid."""
        for layer in self.removed:
            path = f"{self.path}.{layer}"
            for found in hooks_in(model.get_submodule(path)):
                name = f"{path}.{found}".rstrip(".")
                raise SurgeryError(f"{name} has hooks, which would be lost with its layer: remove them first")

    def _check_shards(self, shards: int) -> None:
        for member in (member for group in self.groups for member in group.members):
            if member.width < shards:
                raise SurgeryError(f"{member.name} has {member.width} channels, too few for {shards} shards")

    def _check_layers(self, traced: TracedGraph) -> None:
        """A layer can go if its FFN was all that it did, and its number is its place in the list."""
        seen: set[int] = set()
        for group in self.groups:
            for member in group.members:
                layer, _ = self._split(member.large[0])
                if layer != member.layer or layer in seen:
                    raise SurgeryError(f"{member.name} is not the one FFN of its decoder layer in {self.path}")
                seen.add(layer)
        moved = {layer for attention in self.attentions.values() for layer in attention.layers}
        merged = set(self.removed).difference(self.gone)
        for block in traced.blocks.mixers_of(merged - moved):
            raise SurgeryError(
                f"layer {block.layer} still has attention ({block.name}), so its FFN cannot move to another layer"
            )
        alone = {layer: [block for block in traced.blocks.ffns if block.layer == layer] for layer in sorted(merged)}
        for layer, blocks in alone.items():
            if len(blocks) != 1:
                raise SurgeryError(f"layer {layer} has {len(blocks)} FFNs, so it cannot go with one of them")


def _home_first(group: Group, mixers: Sequence[int], traced: TracedGraph) -> Group:
    """A window's FFN goes to its last layer, behind all its attention; of a wide one, to the last with attention."""
    if group.window is None:
        return group
    home = group.members[-1]
    if mixers:
        home = group.members[_layers_of(group, traced).index(mixers[-1])]
    return replace(group, members=(home, *(member for member in group.members if member is not home)))


def has_mixer(model: nn.Module, layer: int) -> bool:
    """Whether the layer has attention to drop, by the model's own record of what was dropped."""
    record = read_record(getattr(model, "config", None))
    return record is None or layer not in record.dropped_attention


def _refuse_opaque(refusals: Sequence[Refusal], plan: FusionPlan, model: nn.Module) -> None:
    """Say so where weights are of a kind that cannot be joined, or where the model is known to be quantised."""
    planned = {str(member) for group in plan.groups for member in group}
    for refusal in refusals:
        ends = {refusal.layer, *refusal.layer.split(".")}
        if refusal.code is RefusalCode.TENSOR_SUBCLASS and ends & planned:
            raise SurgeryError(f"{refusal.layer}: {refusal.message}: {FUSE_FIRST} (or shard)")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise SurgeryError(f"{type(model).__name__} is quantised, and its FFNs cannot be read: {FUSE_FIRST}")


def _layers_of(group: Group, traced: TracedGraph) -> Sequence[int]:
    numbers: Mapping[object, int] = {block.after: block.layer for block in traced.blocks.ffns}
    missing = [ffn.name for ffn in group.members if ffn.add not in numbers]
    if missing:
        raise SurgeryError(f"{missing[0]} belongs to no numbered decoder layer")
    return [numbers[ffn.add] for ffn in group.members]


def _check_quantised(recipe: GroupRecipe, tensors: Mapping[str, Tensor]) -> None:
    """Raises `SurgeryError` where quantised weights of a group cannot become one exactly."""
    for number, home in enumerate(recipe.home.matrices):
        names = [member.matrices[number].weight for member in recipe.members]
        quantised = [name for name in names if is_quantised(tensors[name])]
        if not quantised:
            continue
        kinds = {kind_of(tensors[name]) for name in names}
        if len(kinds) > 1:
            raise SurgeryError(f"{', '.join(names)} are quantised in different ways: {FUSE_FIRST}")
        is_down = number == len(recipe.home.projections)
        if home.transposed:
            raise SurgeryError(f"{home.weight} is quantised and stored transposed: {FUSE_FIRST}")
        if not is_down and (recipe.home.with_role("gain") or recipe.home.with_role("shift")):
            instead = FUSE_FIRST if recipe.heads else f"use norm='last', or {FUSE_FIRST}"  # attentions always fold
            raise SurgeryError(f"{home.weight} is quantised, so the norm's gain cannot be folded into it: {instead}")
        if is_down and any(recipe.scale(m, tensors, tensors[m.down.weight]) is not None for m in recipe.members):
            raise SurgeryError(f"{home.weight} is quantised, so no scale can be folded into it: {FUSE_FIRST}")
        block = common_block([tensors[name] for name in names], _edges(recipe) if is_down else ())
        if block < _LEAST_BLOCK:
            raise SurgeryError(
                f"{home.weight}: the members' scales fit together only in blocks of {block}: {FUSE_FIRST}"
            )


def _edges(recipe: GroupRecipe) -> list[int]:
    """Where runs of the members' channels begin and end."""
    pairs = (pair for place in range(len(recipe.members)) for pair in recipe.columns(place))
    return [edge for pair in pairs for part in pair for edge in (part.start, part.stop)]
