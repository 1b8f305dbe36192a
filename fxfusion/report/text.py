"""The report as text: a few tables, shortest answer first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from tabulate import tabulate

from fxfusion.errors import Refusal
from fxfusion.report.model import FusionReport, GraphReport, MemberSummary

_STYLE = "simple"


def render(report: FusionReport) -> str:
    fused = sum(len(group.members) for group in report.groups)
    found = sum(len(chain.members) for chain in report.chains)
    head = (
        f"{len(report.chains)} chains with {found} FFNs found; {fused} FFNs fused into {len(report.groups)}; "
        f"{len(report.refusals)} candidates not fused"
    )
    parts = [head, *report.notes]
    for index, graph in enumerate(report.graphs):
        tables = [table for table in (_chains(graph), _groups(graph), _refusals(graph), _passes(graph)) if table]
        if not tables:
            continue
        if len(report.graphs) > 1:
            parts.append(f"graph {index + 1} of {len(report.graphs)}")
        parts += tables
    return "\n\n".join(parts)


def _chains(graph: GraphReport) -> str:
    rows = [
        (
            index,
            len(chain.members),
            span(chain.members),
            sum(member.width for member in chain.members),
            "yes" if chain.leading else "no",
            chain.ended_by,
        )
        for index, chain in enumerate(graph.chains)
    ]
    if not rows:
        return ""
    return "Chains\n" + tabulate(
        rows, ("chain", "FFNs", "from .. to", "total width", "leading", "ended by"), tablefmt=_STYLE
    )


def _groups(graph: GraphReport) -> str:
    proofs = {found["group"]: found for found in graph.verifications}
    rows = []
    for index, group in enumerate(graph.groups):
        proof = proofs.get(index)
        rows.append(
            (
                index,
                len(group.members),
                span(group.members),
                group.width,
                group.norm,
                f"{group.packed_bytes / 2**20:.1f}",
                f"{proof['error']:.1e} (limit {proof['limit']:.0e})" if proof else "-",
            )
        )
    if not rows:
        return ""
    header = ("group", "FFNs", "members", "width", "norm", "packed MiB", "error against parallel form")
    return "Fused groups\n" + tabulate(rows, header, tablefmt=_STYLE)


def _refusals(graph: GraphReport) -> str:
    ordered = sorted(graph.refusals, key=lambda refusal: (refusal.code.value, refusal.message))
    rows = []
    for (code, message), same in groupby(ordered, key=lambda refusal: (refusal.code.value, refusal.message)):
        listed = list(same)
        rows.append((code, len(listed), _where(listed), message, listed[0].source))
    if not rows:
        return ""
    return "Not fused\n" + tabulate(
        rows,
        ("code", "count", "where", "why", "first source line"),
        tablefmt=_STYLE,
        maxcolwidths=[None, None, 34, 60, 30],
    )


def _passes(graph: GraphReport) -> str:
    rows = [
        (
            record["pass"],
            "exact" if record["exact"] else "approximate",
            record["changed"],
            f"{record['nodes_before']} -> {record['nodes_after']}",
            f"{record['seconds'] * 1e3:.1f}",
        )
        for record in graph.history
    ]
    if not rows:
        return ""
    return "Passes\n" + tabulate(rows, ("pass", "kind", "changed", "nodes", "ms"), tablefmt=_STYLE)


def span(members: Sequence[MemberSummary]) -> str:
    """`model.layers.3.mlp .. model.layers.9.mlp`, or the one name."""
    if len(members) == 1:
        return members[0].name
    return f"{members[0].name} .. {members[-1].name}"


def _where(refusals: Iterable[Refusal]) -> str:
    names = [refusal.layer or refusal.node for refusal in refusals]
    shown = ", ".join(names[:3])
    return shown + (f", and {len(names) - 3} more" if len(names) > 3 else "")
