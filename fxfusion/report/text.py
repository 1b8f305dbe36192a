"""The report as text: a few tables of at most 100 columns, shortest answer first."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from fxfusion.errors import Refusal
from fxfusion.report.model import FusionReport, GraphReport, MemberSummary
from fxfusion.report.names import alike, compact

_STYLE = "simple"
_COLUMNS = 100
_GAP = 2  # between two columns of a table
_CODE, _WHERE, _SOURCE = 18, 26, 22


def render(report: FusionReport) -> str:
    parts = [headline(report), *report.notes]
    for index, graph in enumerate(report.graphs):
        tables = [table(graph) for table in (chains, groups, windows, refusals, passes)]
        if not any(tables):
            continue
        if len(report.graphs) > 1:
            parts.append(f"Graph {index + 1} of {len(report.graphs)}")
        parts += [table for table in tables if table]
    return "\n\n".join(parts)


def headline(report: FusionReport) -> str:
    """The result in one line."""
    counts = report.summary
    if not counts["groups"]:
        return f"Nothing to fuse: {_count(counts['ffns'], 'FFN')} found, {counts['in_chains']} of them in chains"
    return (
        f"{counts['fused']} of {_count(counts['ffns'], 'FFN')} fused into {counts['groups']}; "
        f"residual blocks: {counts['blocks_before']} -> {counts['blocks_after']}"
    )


def chains(graph: GraphReport) -> str:
    """The runs of FFNs that were found."""
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
    header = ("chain", "FFNs", "members", "total width", "leading", "ended by")
    return _table("Chains (runs of FFNs with no mixer between them)", header, rows, (None, None, 26, None, None, 28))


def groups(graph: GraphReport) -> str:
    """What became one FFN, and the proof where there is one."""
    proofs = {found["group"]: found for found in graph.verifications}
    rows = []
    for index, group in enumerate(graph.groups):
        proof = proofs.get(index)
        error = f"{proof['error']:.1e} (limit {proof['limit']:.0e})" if proof else "not checked"
        packed = f"{group.packed_bytes / 2**20:.1f}"
        row = (index, len(group.members), span(group.members), group.width, group.form, group.norm, packed, error)
        rows.append(row)
    header = ("group", "FFNs", "members", "width", "form", "norm", "packed MiB", "error")
    title = "Fused groups (error: against the parallel form, relative)"
    table = _table(title, header, rows, (None, None, 15, None, None, None, None, None))
    return "\n".join([table, *_proofs(graph), *_forms(graph)] if rows else [])


def _proofs(graph: GraphReport) -> list[str]:
    """What was proved beside the groups: blocks of mixers, the whole graph, its exact clean-up."""
    return [
        f"{proof['part']}: {'' if proof['passed'] else 'NOT '}proved, error {proof['error']:.1e} "
        f"(limit {proof['limit']:.0e})"
        for proof in graph.verifications
        if proof["group"] is None
    ]


def _forms(graph: GraphReport) -> list[str]:
    """How groups are computed and why, those with the same answer in one line."""
    alike: dict[str, list[str]] = {}
    for index, group in enumerate(graph.groups):
        if group.why:
            alike.setdefault(f"{group.form} ({group.why})", []).append(str(index))
    lines = [f"form of group {', '.join(found)}: {words}" for words, found in alike.items()]
    return [part for line in lines for part in textwrap.wrap(line, _COLUMNS, subsequent_indent="  ")]


def windows(graph: GraphReport) -> str:
    """The groups for whose sake mixers were moved."""
    rows = [
        (index, span(group.members), group.mixers, compact(group.moved) or "none")
        for index, group in enumerate(graph.groups)
        if group.mixers != "none"
    ]
    title = "Windows (approximate: these mixers go before the FFNs of their window)"
    return _table(title, ("group", "members", "mixers", "moved"), rows, (None, 36, None, 36))


def refusals(graph: GraphReport) -> str:
    """Every candidate that was left alone, those with the same reason in one row."""
    rows = []
    for code, sentence, same in alike(graph.refusals):
        names = compact([refusal.layer or refusal.node for refusal in same])
        rows.append((code, f"{len(same)}x {names}" if len(same) > 1 else names, sentence, _sources(same)))
    why = _COLUMNS - _CODE - _WHERE - _SOURCE - 3 * _GAP
    return _table("Not fused", ("code", "where", "why", "source"), rows, (_CODE, _WHERE, why, _SOURCE))


def passes(graph: GraphReport) -> str:
    """What each pass did; those that changed nothing share the last line."""
    rows = [
        (
            record["pass"],
            "exact" if record["exact"] else "approximate",
            record["changed"],
            f"{record['nodes_before']} -> {record['nodes_after']}",
            f"{record['seconds'] * 1e3:.1f}",
        )
        for record in graph.history
        if record["changed"]
    ]
    idle = [record for record in graph.history if not record["changed"]]
    if idle:
        names = ", ".join(dict.fromkeys(str(record["pass"]) for record in idle))
        rows.append((names, "", 0, "", f"{sum(record['seconds'] for record in idle) * 1e3:.1f}"))
    return _table("Passes", ("pass", "kind", "changed", "nodes", "ms"), rows, (42, None, None, None, None))


def span(members: Sequence[MemberSummary]) -> str:
    """`model.layers.3-9.mlp` for those members."""
    return compact([member.name for member in members])


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], widths: Sequence[int | None]) -> str:
    if not rows:
        return ""
    return f"{title}\n" + tabulate(rows, header, tablefmt=_STYLE, maxcolwidths=list(widths), floatfmt=".1f")


def _sources(same: Sequence[Refusal]) -> str:
    found = list(dict.fromkeys(refusal.source for refusal in same if refusal.source))
    return found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "") if found else ""


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
