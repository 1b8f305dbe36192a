"""The typed records that travel from the matchers to the rewriters.

    x ──┬─ prologue (norm) ─ n ─┬─ in-projection 0 (gate) ─ pieces ─┐
        │                       └─ in-projection 1 (up)   ─ pieces ─┴─ middle ─ down ─ end ─ b
        └──────────────────────────────────── add(x, b) ──────────────────────────────────── y

x, y, b: `[..., hidden]`; pieces and middle: `[..., width]`. Records hold node references and no
logic beyond properties; they are stale once the graph has been edited. What differs from kind to kind of FFN is a
`Middle` and an `End`: one file for each, `kinds` lists them.
Source: arXiv 2503.18908, equations 1 to 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import fx

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.graph.isomorphism import Structure
from fxfusion.plan.fusion_plan import PlannedGroup

if TYPE_CHECKING:
    from fxfusion.passes.build_wide import WideBuilder

Role = Literal["gain", "shift", "fixed"]
Inputs = Mapping[fx.Node, bool]  # what nodes read, and whether it depends on the token
TailStep = tuple[Literal["mul", "add"], fx.Node | float]
Form = Literal["concatenated", "prepacked", "members"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`y = x W^T + b`. `weight`: a constant node, `[out, in]`, or `[in, out]` where `transposed`.

    An absent bias is None, never zeros.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Output channels `start:stop:step` of in-projection number `projection`, as `node` reads them."""

    node: fx.Node
    projection: int
    start: int
    stop: int
    step: int = 1

    @property
    def width(self) -> int:
        return len(range(self.start, self.stop, self.step))


class Middle(ABC):
    """How an activation treats the intermediate channels: what is matched, checked and built of it.

    `no_module`: why no wider module computes a group of them; empty where one does. `is_apart`: whether it is computed
    member by member, so that it may know the member's own width and token axes.
    """

    no_module: ClassVar[str] = ""
    is_apart: ClassVar[bool] = False

    @abstractmethod
    def misfit(self, nodes: Sequence[fx.Node], inputs: Inputs, before: Refused | None) -> Refused | None:
        """Why the nodes are no such middle. `before`: what the kind before this one said."""

    def misfit_of(self, members: Sequence[FfnNode]) -> Refused | None:
        """Why members, alike but for their constants, do not fit together."""
        return None

    @abstractmethod
    def joined(self, wide: WideBuilder) -> fx.Node:
        """Builds what the down projection of one wide FFN reads, `[..., sum of widths]`."""

    @abstractmethod
    def apart(self, wide: WideBuilder) -> list[fx.Node]:
        """Builds what each member's own down projection reads, `[..., width]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End(ABC):
    """What stands between a down projection and the branch: what is checked, built, packed and weighed of it.

    `no_module`: as of `Middle`. `steps`: what multiplies the result of `down` or is added to it, in order, where that
    is all: literals and per-channel constants, `[hidden]` or one number.
    """

    no_module: ClassVar[str] = ""
    steps: tuple[TailStep, ...] = ()

    def structure(self, down: fx.Node) -> Structure:
        """What must be alike in the members of a group."""
        return ()

    def check(self, down: fx.Node) -> None:  # noqa: B027 (the plain end has nothing to check)
        """Raises `Refused` where it only looked like this kind. Asked once for each structure."""

    def check_axes(self, down: fx.Node, stream: fx.Node) -> None:  # noqa: B027 (nor axes to make anew)
        """Raises `Refused` where tokens are grouped in a way that cannot be made anew."""

    @abstractmethod
    def branches(self, wide: WideBuilder) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Builds what is added to the stream, in order, each with an old branch whose dtype it gets."""

    def packs_down(self, group: Group) -> bool:
        """Whether the down projections are among the packed weights of a group that has some."""
        return True

    def form_name(self, form: Form) -> str:
        """The name of a group's form in reports."""
        return form


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A residual branch between linear layers, of an FFN or of a mixer: `add = stream + branch(stream)`.

    `nodes`: every node of the branch. `prologue`: from the stream to `normed`, in graph order, with
    the constants it reads in the order it reads them. `projections` read `normed`, `down` is the last linear layer,
    `end` stands behind it.
    """

    stream: fx.Node
    add: fx.Node
    nodes: tuple[fx.Node, ...]
    prologue: tuple[fx.Node, ...]
    prologue_constants: tuple[fx.Node, ...]
    prologue_structure: Structure
    normed: fx.Node
    projections: tuple[Linear, ...]
    down: Linear
    end: End
    name: str

    @property
    def hidden(self) -> int:
        return self.down.out_features

    @property
    def width(self) -> int:
        return self.down.in_features

    def with_role(self, role: Role, roles: Sequence[Role]) -> list[fx.Node]:
        """The constants of the prologue with that role. `roles`: of all of them."""
        return [constant for constant, own in zip(self.prologue_constants, roles, strict=True) if own == role]


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnNode(Branch):
    """One residual feed-forward node; `branch`: what is added.

    `middle`: from the pieces to the input of `down`, in graph order, with its constants as of the prologue;
    `aliases` maps views in it to the values they show; `middle_kind`: how it treats the channels.
    """

    branch: fx.Node
    pieces: tuple[Piece, ...]
    aliases: Mapping[fx.Node, fx.Node]
    middle: tuple[fx.Node, ...]
    middle_constants: tuple[fx.Node, ...]
    middle_kind: Middle
    structure: Structure
    layer: str
    source: str

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        return (*(linear.weight for linear in self.projections), self.down.weight)


def refusal_of(ffn: FfnNode, code: RefusalCode, message: str) -> Refusal:
    """Why an FFN is not fused."""
    return Refusal(code=code, message=message, node=ffn.add.name, layer=ffn.name, source=ffn.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A maximal run of FFN nodes, each reading what the one before wrote.

    `leading`: whether the first member sits in the layer whose mixer wrote the chain's input.
    `ended_by`: what stopped the chain, in words.
    """

    members: tuple[FfnNode, ...]
    leading: bool
    ended_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Consecutive members of one chain that become one FFN. `window`: what was moved to make the chain, if anything.

    `middle`, `end`: the kinds of all members.
    `form`, `why`: how the sum of the members is computed, and the reason (see `choose_form`).
    """

    members: tuple[FfnNode, ...]
    norm: Literal["fold", "last"]
    roles: tuple[Role, ...] = ()
    form: Form = "concatenated"
    why: str = ""
    window: Window | None = None

    @property
    def width(self) -> int:
        return sum(member.width for member in self.members)

    @property
    def middle(self) -> Middle:
        return self.members[0].middle_kind

    @property
    def end(self) -> End:
        return self.members[0].end


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """A residual branch that lets tokens see each other (attention, convolution, scan).

    `stream`: what it is added to and reads. `nodes`: the branch, and what is computed only to be written into a cache.
    `leaks`: what else they read from before the stream: masks, rotary angles, caches.
    """

    add: fx.Node
    stream: fx.Node
    leaks: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    op: str
    layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Neighbouring layers whose mixers go before their FFNs.

    `names`: as the plan or policy gives them. `members`: the FFNs, in order. `mixers`: those that lie between the
    first and the last member, in order: they are moved. `entry`: the stream before the first member, in each shape
    that it has there (some models regroup it into `[tokens, hidden]` for their FFNs).
    """

    names: PlannedGroup
    members: tuple[FfnNode, ...]
    mixers: tuple[Mixer, ...]
    entry: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class NamedWindows:
    """What becomes of the windows that a plan or policy names: they can be had, or are refused."""

    windows: tuple[Window, ...] = ()
    refusals: Mapping[PlannedGroup, Refusal] = field(default_factory=dict)

    def window(self, names: PlannedGroup) -> Window | None:
        return next((window for window in self.windows if window.names == names), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """What the matcher found in one graph."""

    ffns: tuple[FfnNode, ...]
    mixers: tuple[Mixer, ...]
    refusals: tuple[Refusal, ...]
