"""The report's data. Nothing here knows how graphs are matched; `pipeline` fills it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fxfusion.errors import Refusal
from fxfusion.files import replacing

if TYPE_CHECKING:
    from pydantic_core import CoreSchema
    from torch import fx

BlockKind = Literal["mixer", "ffn", "fused", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One residual block of the model, in order: a box of the before/after map.

    `width`: intermediate channels of an FFN (0 for a mixer). `group`: number of the group it belongs
    to, or None. `members`: how many FFNs a fused block stands for. `window`: number of the group for
    whose sake a mixer goes before the FFNs that stand before it, or None.
    """

    kind: BlockKind
    name: str
    detail: str = ""
    width: int = 0
    group: int | None = None
    members: int = 1
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSummary:
    """One FFN. `name`: its module path; `width`: intermediate channels; `hidden`: stream channels."""

    name: str
    layer: str
    hidden: int
    width: int
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSummary:
    """A run of FFNs without a mixer in between."""

    members: tuple[MemberSummary, ...]
    leading: bool
    ended_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """FFNs that became one. `packed_bytes`: memory of the wide weights, beside the originals.

    `why`: the reason for the form, which says how the backend computes their sum (`passes/choose_form.py`).
    `mixers`: what the plan or policy says of the mixers between the members (`"none"`, `"hoist"`, `"wide"`);
    `moved`: layers of the mixers that go before FFNs for the group's sake. `form`: `"concatenated"`, `"prepacked"`,
    `"members"`, or, where each member keeps its own down projection and the norm behind it, `"grouped"` or
    `"grouped_prepacked"`.
    """

    members: tuple[MemberSummary, ...]
    norm: str
    width: int
    packed_bytes: int = 0
    why: str = ""
    mixers: str = "none"
    moved: tuple[str, ...] = ()
    form: str = "concatenated"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """One captured graph. `before` and `after` are graph modules (the same where nothing fused)."""

    chains: tuple[ChainSummary, ...] = ()
    groups: tuple[GroupSummary, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    verifications: tuple[dict[str, Any], ...] = ()
    blocks_before: tuple[Block, ...] = ()
    blocks_after: tuple[Block, ...] = ()
    before: fx.GraphModule | None = None
    after: fx.GraphModule | None = None
    nodes_before: int = 0
    nodes_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "chains": [asdict(chain) for chain in self.chains],
            "groups": [asdict(group) for group in self.groups],
            "refusals": [refusal.to_dict() for refusal in self.refusals],
            "passes": list(self.history),
            "verifications": list(self.verifications),
            "blocks_before": [asdict(block) for block in self.blocks_before],
            "blocks_after": [asdict(block) for block in self.blocks_after],
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphReport:
        """The report of `to_dict`'s data, without its graph modules. Raises `ValueError` that names a wrong field."""
        from pydantic import TypeAdapter

        blocks = TypeAdapter(tuple[Block, ...])
        records = TypeAdapter(tuple[dict[str, Any], ...])
        return cls(
            chains=TypeAdapter(tuple[ChainSummary, ...]).validate_python(data.get("chains", ())),
            groups=TypeAdapter(tuple[GroupSummary, ...]).validate_python(data.get("groups", ())),
            refusals=TypeAdapter(tuple[Refusal, ...]).validate_python(data.get("refusals", ())),
            history=records.validate_python(data.get("passes", ())),
            verifications=records.validate_python(data.get("verifications", ())),
            blocks_before=blocks.validate_python(data.get("blocks_before", ())),
            blocks_after=blocks.validate_python(data.get("blocks_after", ())),
            nodes_before=int(data.get("nodes_before", 0)),
            nodes_after=int(data.get("nodes_after", 0)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionReport:
    """Everything about one model or graph; `str(report)` is the summary in tables.

    A model captured in several graphs has several `graphs`; `chains`, `groups` and `refusals` join
    them, `before` and `after` are those of the graph with the most residual blocks.
    """

    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def chains(self) -> tuple[ChainSummary, ...]:
        return tuple(chain for graph in self.graphs for chain in graph.chains)

    @property
    def groups(self) -> tuple[GroupSummary, ...]:
        return tuple(group for graph in self.graphs for group in graph.groups)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(refusal for graph in self.graphs for refusal in graph.refusals)

    @property
    def summary(self) -> dict[str, int]:
        """Counts: FFNs found, those in chains, those fused; groups, refusals, blocks before and after."""
        before = [block for graph in self.graphs for block in graph.blocks_before]
        return {
            "ffns": sum(block.kind == "ffn" for block in before),
            "in_chains": sum(len(chain.members) for chain in self.chains),
            "chains": len(self.chains),
            "fused": sum(len(group.members) for group in self.groups),
            "groups": len(self.groups),
            "refusals": len(self.refusals),
            "blocks_before": len(before),
            "blocks_after": sum(len(graph.blocks_after) for graph in self.graphs),
            "packed_bytes": total_bytes(self.groups),
        }

    @property
    def verifications(self) -> tuple[dict[str, Any], ...]:
        return tuple(found for graph in self.graphs for found in graph.verifications)

    @property
    def main(self) -> GraphReport:
        """The graph with the most residual blocks."""
        return max(self.graphs, key=lambda graph: len(graph.blocks_before), default=GraphReport())

    @property
    def before(self) -> fx.GraphModule | None:
        return self.main.before

    @property
    def after(self) -> fx.GraphModule | None:
        return self.main.after

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "summary": self.summary,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "notes": list(self.notes),
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """As part of larger data, a report is what `to_dict` gives and `from_dict` takes."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.from_dict(value),
            serialization=core_schema.plain_serializer_function_ser_schema(cls.to_dict),
        )

    @classmethod
    def from_dict(cls, data: Any) -> FusionReport:
        """The report of `to_dict`'s data; `before` and `after` are None. Raises `ValueError` for other data."""
        if not isinstance(data, Mapping) or not isinstance(data.get("graphs"), Sequence):
            raise ValueError("a report has a list of `graphs`")
        graphs = tuple(GraphReport.from_dict(graph) for graph in data["graphs"])
        return cls(graphs=graphs, notes=tuple(str(note) for note in data.get("notes", ())))

    def to_html(self, path: str | Path, title: str = "fxfusion report", *, overwrite: bool = False) -> Path:
        """Write one self-contained HTML page (UTF-8, no outside assets) and return its path.

        Raises `OptionError` where it cannot be written, or where another file is there, unless with `overwrite`.
        """
        from fxfusion.report.html import render

        text = render(self, title)
        with replacing(path, "report", overwrite=overwrite) as beside:
            beside.write_text(text, encoding="utf-8")
        return Path(path)

    def __str__(self) -> str:
        from fxfusion.report.text import render

        return render(self)


def total_bytes(groups: Sequence[GroupSummary]) -> int:
    """Memory of all packed weights."""
    return sum(group.packed_bytes for group in groups)
