"""The report of a compile as one HTML page: a map of the layers, tables, no outside assets.

This module turns the report into rows for the templates `page.html.j2` and `graph.html.j2`, which hold all
the markup; every value passes through jinja2's autoescape.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfusion.report.charts.figure import COLOURS
from fxfusion.report.charts.layer_map import map_of_graph
from fxfusion.report.model import FusionReport, GraphReport
from fxfusion.report.names import HUES, alike, compact
from fxfusion.report.text import headline, span

if TYPE_CHECKING:
    from jinja2 import Environment


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
    found.globals["colours"] = COLOURS
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
        "blocks": len(graph.blocks_before),
        "map": map_of_graph(graph, f"g{index}") if graph.blocks_before else None,
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
