"""FusionReport: text and plain data."""

from __future__ import annotations

import json

from fxfusion.report import FusionReport
from tests.helpers import Attention, Stack, fuse, randomise, stack, tokens


def report_of(**options: object) -> FusionReport:
    model = Stack([Attention(), *stack(count=4).layers])
    randomise(model)
    return fuse(model, tokens(), **options)[1]


def test_plain_data_survives_json() -> None:
    report = report_of(policy={"keep_last": 1}, verify="numeric")
    found = json.loads(json.dumps(report.to_dict()))
    (graph,) = found["graphs"]
    assert [member["name"] for member in graph["groups"][0]["members"]] == [
        "layers.1.ffn",
        "layers.2.ffn",
        "layers.3.ffn",
    ]
    assert graph["groups"][0]["width"] == 36
    assert {refusal["code"] for refusal in graph["refusals"]} == {"token_mixing", "policy"}
    assert set(graph["refusals"][0]) == {"code", "message", "node", "layer", "source"}
    assert graph["verifications"][0]["passed"] is True
    names = [record["pass"] for record in graph["passes"]]
    assert names[-4:] == ["parallelise", "concatenate", "concat_parallel_mixers", "lift_weights"]
    assert [record["exact"] for record in graph["passes"]][-4:] == [False, True, True, True]
    assert [block["kind"] for block in graph["blocks_before"]] == ["mixer", "ffn", "ffn", "ffn", "ffn"]
    assert [block["kind"] for block in graph["blocks_after"]] == ["mixer", "fused", "ffn"]
    assert graph["nodes_after"] < graph["nodes_before"]


def test_packed_bytes() -> None:
    (group,) = report_of(policy={"keep_last": 1}).groups
    assert group.packed_bytes == 3 * 3 * 8 * 12 * 8  # members, weights, hidden, width, bytes of float64


def test_text_names_groups_refusals_and_passes() -> None:
    text = str(report_of(policy={"keep_last": 1}))
    for words in ("3 of 4 FFNs fused into 1", "layers", "token_mixing", "keep_last is 1", "concatenate"):
        assert words in text, text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_reports_of_several_graphs_are_joined() -> None:
    one, two = report_of(), report_of(policy={"keep_last": 1})
    both = FusionReport(graphs=(*one.graphs, *two.graphs), notes=("two",))
    assert len(both.groups) == len(both.chains) == 2
    assert len(both.refusals) == len(one.refusals) + len(two.refusals)
    assert both.before is not None and both.to_dict()["notes"] == ["two"]
    assert "two" in str(both)
    assert FusionReport(graphs=()).before is None
