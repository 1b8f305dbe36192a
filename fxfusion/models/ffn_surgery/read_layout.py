"""Read off a captured graph which parameters make up each member of a group, and whether modules can hold the result.

Raises `SurgeryError` where they cannot: the graph may compute a weight, the modules hold only parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, fx, nn

from fxfusion.errors import SurgeryError
from fxfusion.graph import ops
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Constant, Cut, Matrix, Member, TailStep
from fxfusion.models.ffn_surgery.quantised import FUSE_FIRST
from fxfusion.models.traced import TracedGraph
from fxfusion.passes.check_group import reader_outside
from fxfusion.passes.ffn import Branch, FfnNode, Group, Linear
from fxfusion.passes.lift_weights import constant_graph, constant_needs
from fxfusion.passes.match_residual import weight_leaves

BY_THE_BACKEND = "torch.compile(model, backend=fxfusion.ffn_fusion) with the same plan fuses them as a graph"


class Named(Protocol):
    """An FFN or an attention, for messages."""

    @property
    def name(self) -> str: ...


@dataclass(slots=True)
class LayoutReader:
    """Answers for one captured model. `names`: of each parameter or buffer, by identity, several where it is tied."""

    model: nn.Module
    traced: TracedGraph
    facts: GraphFacts
    names: Mapping[int, list[str]]

    @classmethod
    def of(cls, model: nn.Module, traced: TracedGraph) -> LayoutReader:
        names: dict[int, list[str]] = {}
        for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            names.setdefault(id(value), []).append(name)
        return cls(model, traced, GraphFacts(traced.captured.module.graph, traced.captured.weights), names)

    def recipe(self, group: Group, layers: Sequence[int]) -> GroupRecipe:
        """How the group's parameters become wide ones. `layers`: the decoder layer of each member."""
        words = group.end.no_module or group.middle.no_module
        if words:
            raise SurgeryError(
                f"{group.members[0].name}: {words}, so no wider module computes this group; {BY_THE_BACKEND}"
            )
        shared = [
            len({ffn.middle_constants[index] for ffn in group.members}) == 1
            for index in range(len(group.members[0].middle_constants))
        ]
        members = tuple(
            self._member(ffn, layer, group, shared) for ffn, layer in zip(group.members, layers, strict=True)
        )
        return self.joined(
            group.members[0],
            members,
            group.members[0].middle_constants,
            norm=group.norm,
            mixers="none" if group.window is None else group.window.names.mixers,
            copies=self._copies(group, members) if group.norm == "last" else (),
        )

    def joined(
        self, home: Branch, members: tuple[Member, ...], constants: Sequence[fx.Node], **fields: Any
    ) -> GroupRecipe:
        """The recipe of members that were read, the first of which has its nodes in `home`. `constants`: what is read
        between its ends; `fields`: others of the recipe."""
        steps = [step for _, step in home.end.steps if isinstance(step, fx.Node)]
        fills = [self.fill(home, constant, 1.0) for constant in members[0].with_role("gain")]
        fills += [self.fill(home, constant, 0.0) for constant in members[0].with_role("shift")]
        fills += [
            self.fill(home, step, 1.0 if kind == "mul" else 0.0)
            for kind, step in members[0].tail
            if isinstance(step, Constant)
        ]
        has_shift = bool(members[0].with_role("shift"))
        recipe = GroupRecipe(
            members=members,
            fills=tuple(fills),
            in_bias=has_shift or any(matrix.bias is not None for member in members for matrix in member.projections),
            down_bias=any(
                member.down.bias is not None or any(kind == "add" for kind, _ in member.tail) for member in members
            ),
            **fields,
        )
        self._check_biases(recipe)
        self._check_readers(home, (*home.prologue_constants, *constants, *steps), recipe)
        return recipe

    def _member(self, ffn: FfnNode, layer: int, group: Group, shared_middle: Sequence[bool]) -> Member:
        biases = {linear.node: self._separate_bias(ffn, linear) for linear in (*ffn.projections, ffn.down)}
        middle = [
            None if shared or node in biases.values() else self.constant(ffn, node)
            for shared, node in zip(shared_middle, ffn.middle_constants, strict=True)
        ]
        for constant in middle:
            if constant is not None and len(constant.names) != 1:
                raise SurgeryError(f"{ffn.name}: a constant of its activation is computed from {len(constant.names)}")
        own = ffn.end.steps[1:] if biases[ffn.down.node] is not None else ffn.end.steps
        return Member(
            layer=layer,
            name=ffn.name,
            width=ffn.width,
            projections=tuple(self.matrix(ffn, linear, biases[linear.node]) for linear in ffn.projections),
            cuts=self._cuts(ffn),
            down=self.matrix(ffn, ffn.down, biases[ffn.down.node]),
            prologue=tuple(self.constant(ffn, node) for node in ffn.prologue_constants),
            roles=group.roles,
            middle=tuple(middle),
            tail=self.tail(ffn, own),
        )

    def tail(self, ffn: Named, steps: Sequence[tuple[Literal["mul", "add"], fx.Node | float]]) -> tuple[TailStep, ...]:
        """What is done to the result of the last projection."""
        return tuple((kind, self.constant(ffn, step) if isinstance(step, fx.Node) else step) for kind, step in steps)

    def _cuts(self, ffn: FfnNode) -> tuple[Cut, ...]:
        """The pieces that the activation reads, which must be all channels of each projection, each once."""
        found = tuple(Cut(piece.projection, piece.start, piece.stop, piece.step) for piece in ffn.pieces)
        for number, linear in enumerate(ffn.projections):
            own = [range(cut.start, cut.stop, cut.step) for cut in found if cut.projection == number]
            in_place = all(
                channels.start % ffn.width == 0 if channels.step == 1 else channels.step == len(own) for channels in own
            )
            if not in_place or sorted(channel for part in own for channel in part) != list(range(linear.out_features)):
                raise SurgeryError(f"{ffn.name}: its activation does not read {linear.node} in whole pieces, each once")
        return found

    def matrix(self, ffn: Named, linear: Linear, separate_bias: fx.Node | None = None) -> Matrix:
        """The parameters of a linear layer."""
        weight, bias = self.parameter(ffn, linear.weight), linear.bias or separate_bias
        return Matrix(weight, linear.transposed, None if bias is None else self.parameter(ffn, bias))

    def _separate_bias(self, ffn: FfnNode, linear: Linear) -> fx.Node | None:
        """The vector that a linear layer without a bias has added to its result at once, as one more operation."""
        users = list(linear.node.users)
        if linear.bias is not None or len(users) != 1 or ops.op_name(users[0]) != "add" or users[0] not in ffn.nodes:
            return None
        others = [node for node in users[0].all_input_nodes if node is not linear.node]
        value = ops.tensor_value(others[0]) if len(others) == 1 and others[0] in self.facts.constants else None
        is_vector = value is not None and value.dim() == 1 and value.numel() == linear.out_features
        return others[0] if is_vector and self._name(ffn, others[0]) is not None else None

    def parameter(self, ffn: Named, node: fx.Node) -> str:
        """Its name. Raises `SurgeryError` where the node is none."""
        name = self._name(ffn, node)
        if name is None:
            raise SurgeryError(
                f"{ffn.name}: {node} is computed, not a parameter that could become wider "
                f"(where it is computed from a quantised weight: {FUSE_FIRST})"
            )
        return name

    def _name(self, ffn: Named, node: fx.Node) -> str | None:
        value = self.traced.captured.values.get(node.name)
        found = [] if value is None else self.names.get(id(value), [])
        if len(found) > 1:
            raise SurgeryError(f"{ffn.name}: a weight of it is used in several places: {', '.join(found)}")
        return found[0] if found else None

    def constant(self, ffn: Named, node: fx.Node) -> Constant:
        """A small tensor and the parameters that it is computed from."""
        name = self._name(ffn, node)
        if name is not None:
            return Constant((name,))
        sources, inner = constant_needs([node], self.facts)
        names = tuple(self.parameter(ffn, source) for source in sources)
        return Constant(names, constant_graph(sources, inner, [node]))

    def fill(self, ffn: Named, constant: Constant, wanted: float) -> tuple[str, float]:
        """The one parameter of a constant, and the number that makes the constant `wanted`."""
        example = self.tensor(constant.names[0])
        fill = constant.fill_for(wanted, example)
        if fill is None:
            raise SurgeryError(f"{ffn.name}: {', '.join(constant.names)} cannot be set so that it does nothing")
        return constant.names[0], fill

    def _copies(self, group: Group, members: Sequence[Member]) -> tuple[tuple[str, str], ...]:
        """The home's norm takes the last member's parameters."""
        place = max(range(len(members)), key=lambda index: members[index].layer)
        first, last = group.members[0], group.members[place]
        pairs: list[tuple[str, str]] = []
        for index, node in enumerate(first.prologue_constants):
            if node is not last.prologue_constants[index]:
                pairs += zip(members[0].prologue[index].names, members[place].prologue[index].names, strict=True)
        return tuple(pairs)

    def tensor(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        found: Any = getattr(self.model.get_submodule(owner), attribute)
        assert isinstance(found, Tensor)
        return found

    def _check_biases(self, recipe: GroupRecipe) -> None:
        """A bias that appears needs a module that can hold one."""
        wanted = [(matrix, recipe.in_bias) for matrix in recipe.home.projections]
        for matrix, needed in [*wanted, (recipe.home.down, recipe.down_bias)]:
            owner = self.model.get_submodule(matrix.weight.rpartition(".")[0])
            if needed and matrix.bias is None and not isinstance(owner, nn.Linear):
                raise SurgeryError(f"{recipe.home.name}: the fused FFN needs a bias that {type(owner).__name__} lacks")

    def _check_readers(self, ffn: Branch, constants: Sequence[fx.Node], recipe: GroupRecipe) -> None:
        """What is set to other values must be read by this FFN (or attention) alone."""
        changed = set(recipe.writes)
        own = set(ffn.nodes)
        for node in constants:
            for leaf in weight_leaves(node, self.facts):
                reader = reader_outside([leaf], own, self.facts)
                if self._name(ffn, leaf) in changed and reader is not None:
                    raise SurgeryError(f"{ffn.name}: {self._name(ffn, leaf)} is also read by {reader}")
