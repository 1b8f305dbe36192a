"""What a pass is: a named step with a contract, over one graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from torch import fx

from fxfusion.errors import Refusal


@dataclass(frozen=True, slots=True)
class PassResult:
    """`changed`: rewrites made (0: the graph is untouched). `refusals`: what was left alone, and why."""

    changed: int
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What the pass manager saw of one pass. `seconds`: wall time with its clean-up and checks."""

    name: str
    exact: bool
    changed: int
    nodes_before: int
    nodes_after: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        found = asdict(self)
        return {"pass": found.pop("name"), **found, "notes": list(self.notes)}


class Pass(ABC):
    """One graph rewrite.

    `exact`: whether the graph computes the same function afterwards, up to rounding. An approximate
    pass changes the function and runs only on a plan's or policy's word.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    settles: ClassVar[bool] = False
    """Whether it writes out what was not known, so that an effect that might have been can turn out to be none."""

    @abstractmethod
    def run(self, graph: fx.Graph) -> PassResult:
        """Edit the graph in place."""

    def ensures(self, graph: fx.Graph) -> Sequence[str]:
        """What is wrong with the graph after the pass; empty when all is well."""
        return ()


@dataclass
class History:
    """The passes that ran over one graph, in order. Without `check`, none is linted or checked.

    `effects`: names of the nodes whose effects can be seen from outside, in order, as the last pass left them.
    """

    check: bool = True
    records: list[PassRecord] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    effects: list[str] | None = None
