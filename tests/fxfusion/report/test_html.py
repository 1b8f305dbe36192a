"""The HTML page: one file, everything in it, nothing from outside, nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fxfusion.errors import Refusal, RefusalCode
from fxfusion.report import Block, ChainSummary, FusionReport, GraphReport, GroupSummary, MemberSummary
from fxfusion.report.html import render

VOID = {"meta", "link", "br", "img", "hr", "input"}


def member(layer: int, width: int = 64) -> MemberSummary:
    return MemberSummary(
        name=f"model.layers.{layer}.mlp", layer=f"model.layers.{layer}", hidden=16, width=width, source="m.py:7"
    )


def ffn(layer: int, group: int | None, width: int = 64) -> Block:
    return Block(kind="ffn", name=f"model.layers.{layer}.mlp", width=width, group=group)


def mixer(layer: int) -> Block:
    return Block(kind="mixer", name=f"model.layers.{layer}", detail="attention_op")


def graph_report(**changes: object) -> GraphReport:
    """Mixer, three FFNs of which two are fused (widths 64 and 192), a refused block."""
    group = GroupSummary(members=(member(1), member(2, 192)), norm="fold", width=256, packed_bytes=2**20)
    refused = Block(kind="refused", name="model.layers.4", detail="router")
    before = (mixer(0), ffn(0, None), ffn(1, 0), ffn(2, 0, 192), refused)
    fused = Block(kind="fused", name="x", width=256, group=0, members=2)
    fields: dict[str, object] = {
        "chains": (
            ChainSummary(members=(member(0), member(1), member(2, 192)), leading=True, ended_by="a tap follows"),
        ),
        "groups": (group,),
        "refusals": (
            Refusal(code=RefusalCode.ROUTER, message="top-k <routing>", layer="model.layers.4", source="moe.py:33"),
            Refusal(code=RefusalCode.POLICY, message="kept by the policy", layer="model.layers.0.mlp", source="m.py:7"),
        ),
        "history": (
            {
                "pass": "concatenate",
                "exact": True,
                "changed": 1,
                "nodes_before": 90,
                "nodes_after": 70,
                "seconds": 0.25,
                "notes": ["one note"],
            },
            {
                "pass": "idle_pass",
                "exact": True,
                "changed": 0,
                "nodes_before": 70,
                "nodes_after": 70,
                "seconds": 0.01,
                "notes": [],
            },
        ),
        "blocks_before": before,
        "blocks_after": (mixer(0), ffn(0, None), fused, refused),
        "nodes_before": 90,
        "nodes_after": 70,
    }
    return GraphReport(**{**fields, **changes})  # type: ignore[arg-type]


def page(graph: GraphReport, **report: object) -> str:
    return render(FusionReport(graphs=(graph,), **report))  # type: ignore[arg-type]


class Balance(HTMLParser):
    """Notes tags that are not closed in order, ids, and links within the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parsed(text: str) -> Balance:
    balance = Balance()
    balance.feed(text)
    return balance


def test_the_page_is_well_formed_and_its_links_lead_somewhere() -> None:
    found = parsed(page(graph_report()))
    assert not found.wrong and not found.open
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)


def test_an_unclosed_tag_is_found() -> None:
    assert parsed("<div><p></div>").wrong


def test_nothing_comes_from_outside() -> None:
    text = page(graph_report())
    assert not re.search(r"https?://|url\((?!#)|@import|<script|<link|<img|src=", text)


@pytest.mark.parametrize(
    "shown",
    [
        "2 of 3",
        "5 → 4",
        "90 → 70",
        "1.0 MiB",
        "model.layers.1-2.mlp",
        "a tap follows",
        "router",
        "top-k &lt;routing&gt;",
        "model.layers.4",
        "moe.py:33",
        "concatenate",
        "250.0",
        "one note",
        "were not compared numerically",
        "1 of 2 changed the graph",
        "prefers-color-scheme: dark",
        "<title>Map of the layers</title><desc>Which layers",
        "not fused (policy): kept by the policy\nm.py:7",
        'name="viewport"',
    ],
)
def test_the_page_shows(shown: str) -> None:
    assert shown in page(graph_report())


def test_a_pass_that_changed_nothing_is_only_counted() -> None:
    assert "idle_pass" not in page(graph_report())


def test_names_of_the_model_are_escaped() -> None:
    hostile = "<b>bold</b>\"'onmouseover="
    block = Block(kind="ffn", name=hostile, width=3)
    refusal = Refusal(code=RefusalCode.ALONE, message=hostile, layer=hostile, source=hostile)
    text = render(
        FusionReport(
            graphs=(graph_report(blocks_before=(block,), blocks_after=(block,), groups=(), refusals=(refusal,)),),
            notes=(hostile,),
        ),
        title=hostile,
    )
    assert "<b>bold" not in text and "&lt;b&gt;bold" in text
    assert "\"'onmouseover" not in text


@pytest.mark.parametrize(("passed", "mark"), [(True, "✓ 3.0e-07"), (False, "✗ 3.0e-07")])
def test_proofs_are_shown_with_their_verdict(passed: bool, mark: str) -> None:
    proof = {"group": 0, "dtype": "float32", "error": 3e-7, "limit": 1e-5, "passed": passed}
    text = page(graph_report(verifications=(proof,)))
    assert text.count(mark) == 2  # in the key figures and in the table
    assert "compared numerically" not in text


@pytest.mark.parametrize(("passed", "mark"), [(True, "✓ whole graph: error 3.0e-07"), (False, "✗ whole graph")])
def test_the_proof_of_the_whole_graph_is_shown(passed: bool, mark: str) -> None:
    proof = {"part": "whole graph", "group": None, "dtype": "float32", "error": 3e-7, "limit": 1e-5, "passed": passed}
    text = page(graph_report(verifications=(proof,)))
    assert mark in text and "were not compared numerically" in text and not parsed(text).wrong


def test_a_graph_with_nothing_in_it() -> None:
    text = page(GraphReport(), notes=("graph breaks cut the model into 3 graphs",))
    assert "Nothing to fuse" in text and "No residual block" in text and "cut the model into 3" in text
    assert not parsed(text).wrong


def test_several_graphs_have_their_own_anchors_and_empty_ones_are_counted() -> None:
    text = render(FusionReport(graphs=(graph_report(), GraphReport(), graph_report())))
    found = parsed(text)
    assert len(found.ids) == len(set(found.ids)) and "g2-group0" in found.ids
    assert "1 captured graph without residual blocks" in text


def test_to_html_writes_the_page(tmp_path: Path) -> None:
    path = FusionReport(graphs=(graph_report(),)).to_html(tmp_path / "r.html", title="my model")
    text = path.read_text("utf-8")
    assert path == tmp_path / "r.html" and text.startswith("<!DOCTYPE html>") and "<title>my model</title>" in text
