"""The report as text: what it says, and that it fits 100 columns."""

from __future__ import annotations

import pytest

from fxfusion.errors import Refusal, RefusalCode
from fxfusion.report import ChainSummary, FusionReport, GraphReport, GroupSummary, MemberSummary
from fxfusion.report.names import alike, compact, number, ranges, tail


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.0.f", "a.1.f", "a.2.f", "a.9.f"], "a.0-2,9.f"),
        (["a.1", "a.3", "b"], "a.1,3, b"),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], "s.0.b.0-1, s.1.b.0"),
        (["h.3.mlp.0", "h.4.mlp.0"], "h.3-4.mlp.0"),
        (["x.gate", "x.up"], "x.gate, x.up"),
        (["a.2", "a.1"], "a.2,1"),
        ([], ""),
    ],
)
def test_compact(names: list[str], short: str) -> None:
    assert compact(names) == short


def test_tail_starts_at_the_first_number() -> None:
    assert [tail("model.layers.3.mlp"), tail("3"), tail("head")] == ["3.mlp", "3", "head"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12288, "12,288"), (0.012345, "0.0123"), (1.0, "1"), (-0.5, "-0.5"), (1.2e-7, "1.2e-07")],
)
def test_number(value: float, text: str) -> None:
    assert number(value, 5 if value == 12288 else 3) == text


def test_ranges() -> None:
    assert ranges([3, 4, 5, 7, 8, 10], ", ") == "3-5, 7-8, 10" and ranges([]) == ""


def refusal(code: RefusalCode, message: str, layer: str) -> Refusal:
    return Refusal(code=code, message=message, layer=layer, source="file.py:10")


def test_refusals_that_differ_only_in_the_layer_share_a_row_and_mixers_come_last() -> None:
    given = [
        refusal(RefusalCode.TOKEN_MIXING, "attention mixes", "m.0"),
        refusal(RefusalCode.ALONE, "attention in m.0 comes before", "m.0.mlp"),
        refusal(RefusalCode.ALONE, "attention in m.1 comes before", "m.1.mlp"),
        refusal(RefusalCode.ALONE, "nothing follows m.2", "m.2.mlp"),
    ]
    found = [(code, sentence, len(same)) for code, sentence, same in alike(given)]
    assert found == [
        ("alone", "attention comes before", 2),
        ("alone", "nothing follows m.2", 1),
        ("token_mixing", "attention mixes", 1),
    ]


def report() -> FusionReport:
    members = tuple(
        MemberSummary(name=f"language_model.decoder.layers.{i}.feed_forward", layer="", hidden=8192, width=28672)
        for i in range(40, 70)
    )
    passes = ("drop_no_ops", 4), ("functionalise_adds", 0), ("hoist_constants", 0), ("concatenate", 1)
    history = tuple(
        {"pass": name, "exact": True, "changed": n, "nodes_before": 9, "nodes_after": 8, "seconds": 0.001, "notes": []}
        for name, n in passes
    )
    long = "no neighbour to fuse with: scaled_dot_product_attention in language_model.decoder.layers.1 comes before"
    graph = GraphReport(
        chains=(ChainSummary(members=members, leading=False, ended_by="scaled_dot_product_attention in x.70 follows"),),
        groups=(GroupSummary(members=members, norm="fold", width=860160, packed_bytes=2**36),),
        refusals=(refusal(RefusalCode.INNER_VALUE_READ, long, "language_model.decoder.layers.1.feed_forward"),),
        history=history,
        verifications=(
            {"part": "group 0", "group": 0, "dtype": "float32", "error": 3e-7, "limit": 1e-5, "passed": True},
            {"part": "whole graph", "group": None, "dtype": "int64", "error": 2e-8, "limit": 1e-5, "passed": True},
            {"part": "mixers 0", "group": None, "dtype": "float32", "error": 1.0, "limit": 1e-5, "passed": False},
        ),
    )
    return FusionReport(graphs=(graph,), notes=("a note",))


def test_the_text_fits_100_columns() -> None:
    lines = str(report()).splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)


@pytest.mark.parametrize(
    "shown",
    [
        "a note",
        "40-69",
        "860160",
        "3.0e-07 (limit 1e-05)",
        "inner_value_read",
        "whole graph: proved, error 2.0e-08",
        "mixers 0: NOT proved",
    ],
)
def test_the_text_says(shown: str) -> None:
    assert shown in str(report())


def test_passes_that_changed_nothing_share_a_line() -> None:
    text = str(report())
    assert "functionalise_adds, hoist_constants" in text
    assert text.count("\ndrop_no_ops") == text.count("\nconcatenate") == 1


def test_nothing_to_fuse_is_said_first() -> None:
    assert str(FusionReport(graphs=(GraphReport(),))).startswith("Nothing to fuse: 0 FFNs found")
