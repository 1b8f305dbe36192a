"""The report as one HTML page: the map of the model before and after, tables, no outside assets.

This module turns the report into rows for the templates `page.html.j2` and `graph.html.j2`, which hold all
the markup; every value passes through jinja2's autoescape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfusion.errors import Refusal
from fxfusion.report.model import Block, FusionReport, GraphReport, GroupSummary
from fxfusion.report.names import alike, compact, tail
from fxfusion.report.text import headline, span

if TYPE_CHECKING:
    from jinja2 import Environment

HUES = 8  # colours of groups in the style sheet; more groups start again
INSIDE = 70.0  # percent of the column from which on a label stands in its box
_READABLE = 5.0  # percent of the column below which a slice is too narrow for its label
_MIXER_PERCENT = 12.0  # a mixer has no intermediate width, so its box has a fixed one


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a box: one FFN. `share`: percent of the box. `label` is drawn inside."""

    share: float
    label: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One block on the map. `row` and `rows`: where it stands; `percent`: width of the box in its column."""

    kind: str
    row: int
    rows: int
    percent: float
    label: str
    title: str
    link: str
    hue: int | None
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The map of one graph: boxes of both columns, and the number of rows they share."""

    before: tuple[Box, ...]
    after: tuple[Box, ...]
    rows: int


def render(report: FusionReport, title: str = "fxfusion report") -> str:
    """The page as text."""
    graphs, empty = graph_rows(report)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            headline=headline(report).replace("->", "→"),
            tiles=_tiles(report),
            notes=report.notes,
            graphs=graphs,
            empty=empty,
        )
    )


def environment() -> Environment:
    """Where the templates are, and how they treat values: escaped, and an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["inside"] = INSIDE
    return found


def graph_rows(report: FusionReport) -> tuple[list[dict[str, Any]], int]:
    """What `graph.html.j2` shows of each graph, and how many graphs without residual blocks are left out."""
    graphs = [_graph(graph, index) for index, graph in enumerate(report.graphs)]
    shown = [graph for graph in graphs if graph["worth"]]
    return (shown, len(graphs) - len(shown)) if shown else (graphs[:1], 0)


def _tiles(report: FusionReport) -> list[tuple[str, str]]:
    """The key figures, as value and caption."""
    counts = report.summary
    nodes = (
        sum(graph.nodes_before for graph in report.graphs),
        sum(graph.nodes_after for graph in report.graphs),
    )
    tiles = [
        (f"{counts['fused']} of {counts['ffns']}", "FFNs fused"),
        (str(counts["groups"]), "wide FFNs made of them"),
        (f"{counts['blocks_before']} → {counts['blocks_after']}", "residual blocks"),
        (f"{nodes[0]} → {nodes[1]}", "graph nodes"),
        (f"{counts['packed_bytes'] / 2**20:.1f} MiB", "packed weights"),
    ]
    if report.verifications:
        worst = max(float(proof["error"]) for proof in report.verifications)
        passed = all(proof["passed"] for proof in report.verifications)
        tiles.append((f"{'✓' if passed else '✗'} {worst:.1e}", "largest error, fused against parallel"))
    return tiles


def _graph(graph: GraphReport, index: int) -> dict[str, Any]:
    """Everything the template shows of one graph. `id` keeps the anchors of several graphs apart."""
    proofs = {proof["group"]: proof for proof in graph.verifications}
    kinds = [
        {
            "code": code,
            "sentence": sentence,
            "same": same,
            "names": compact([r.layer or r.node for r in same]),
        }
        for code, sentence, same in alike(graph.refusals)
    ]
    return {
        "id": f"g{index}",
        "number": index + 1,
        "worth": bool(graph.blocks_before or graph.refusals or graph.groups),
        "picture": draw(graph, f"g{index}"),
        "groups": [
            {
                "summary": group,
                "span": span(group.members),
                "moved": compact(group.moved),
                "proof": proofs.get(number),
                "hue": number % HUES,
            }
            for number, group in enumerate(graph.groups)
        ],
        "proofs": [proof for proof in graph.verifications if proof["group"] is None],
        "chains": [(span(chain.members), chain) for chain in graph.chains],
        "kinds": kinds,
        "proved": any(group in proofs for group in range(len(graph.groups))),
        "passes": graph.history,
        "busy": [record for record in graph.history if record["changed"] or record.get("notes")],
        "slowest": max((float(record["seconds"]) for record in graph.history), default=0.0) or 1.0,
        "nodes": (graph.nodes_before, graph.nodes_after),
    }


def draw(graph: GraphReport, anchor: str = "g0") -> Picture:
    """Boxes of both columns, in proportion: the widest FFN of either column fills its column."""
    blocks = graph.blocks_before
    widest = max([block.width for block in blocks] + [group.width for group in graph.groups], default=0) or 1
    reasons = {refusal.layer or refusal.node: refusal for refusal in graph.refusals}
    before = [_box(block, row, widest, reasons, anchor) for row, block in enumerate(blocks)]
    after = [box for box, block in zip(before, blocks, strict=True) if block.group is None]
    for index, group in enumerate(graph.groups):
        rows = [row for row, block in enumerate(blocks) if block.group == index]
        if rows:
            after.append(_fused_box(group, index, rows, widest, anchor))
    return Picture(before=tuple(before), after=tuple(sorted(after, key=lambda box: box.row)), rows=len(blocks))


def _box(block: Block, row: int, widest: int, reasons: dict[str, Refusal], anchor: str) -> Box:
    refusal = reasons.get(block.name) if block.group is None else None
    lines = [block.name]
    if block.width:
        lines.append(f"FFN, intermediate width {block.width}")
    if block.kind == "mixer":
        lines.append(f"token mixer: {block.detail}")
    if block.window is not None:
        lines.append(f"moved before the FFNs of its window, group {block.window}")
    if block.group is not None:
        lines.append(f"fused, group {block.group}")
    elif refusal is not None:
        lines.append(f"not fused ({refusal.code.value}): {refusal.message}")
        lines += [refusal.source] if refusal.source else []
    link = f"#{anchor}-refusals" if refusal is not None else ""
    group = block.group if block.group is not None else block.window
    return Box(
        kind=block.kind,
        row=row,
        rows=1,
        percent=100.0 * block.width / widest if block.width else _MIXER_PERCENT,
        label=_label(block),
        title="\n".join(lines),
        link=link if group is None else f"#{anchor}-group{group}",
        hue=None if block.group is None else block.group % HUES,
    )


def _label(block: Block) -> str:
    if block.kind == "mixer":
        return f"{tail(block.name)} mixer" + ("" if block.window is None else f" (moved, group {block.window})")
    if block.kind == "refused":
        return f"{tail(block.name)} {block.detail}"
    return f"{tail(block.name)} {block.width}"


def _fused_box(group: GroupSummary, index: int, rows: Sequence[int], widest: int, anchor: str) -> Box:
    total = sum(member.width for member in group.members) or 1
    readable = _READABLE / 100 * widest
    slices = tuple(
        Slice(
            share=100.0 * member.width / total,
            label=tail(member.name).split(".")[0] if member.width >= readable else "",
            title=f"{member.name}\nwidth {member.width} of {group.width}, group {index}",
        )
        for member in group.members
    )
    lines = [
        span(group.members),
        f"one FFN of width {group.width}, made of {len(group.members)}",
        f"norm: {group.norm}",
    ]
    return Box(
        kind="fused",
        row=rows[0],
        rows=rows[-1] - rows[0] + 1,
        percent=100.0 * group.width / widest,
        label=f"group {index}: {len(group.members)} FFNs in one, width {group.width}",
        title="\n".join(lines),
        link=f"#{anchor}-group{index}",
        hue=index % HUES,
        slices=slices,
    )
