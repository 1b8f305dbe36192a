"""Results of models that do not exist, for tests: all parts, with numbers that look like real ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from fxfusion.errors import Refusal, RefusalCode
from fxfusion.report import Block, ChainSummary, FusionReport, GraphReport, GroupSummary, MemberSummary
from fxfusion.report.results import (
    Contest,
    Entry,
    Interval,
    Layer,
    Matrix,
    Model,
    PlanFacts,
    ProbeRow,
    QualityRow,
    Results,
    Sample,
    SpeedRow,
    SweepPoint,
)

UNMEASURED = 3  # a row of the large matrix
YAML = "version: 1\ndropped_attention: [4, 5, 6]\n"


def everything(count: int = 12, groups: Sequence[Sequence[int]] = ((4, 5, 6, 7),), seed: int = 0) -> Results:
    """A model of `count` layers with every part there. The attention of the groups' layers is dropped."""
    draw = random.Random(seed)
    dropped = tuple(layer for group in groups for layer in group)
    layers = tuple(_layer(number, groups, count, draw) for number in range(count))
    return Results(
        model=Model(
            name="some/model",
            architecture="SomeForCausalLM",
            layers=count,
            hidden=256,
            vocabulary=4096,
            parameters=9_312_512,
        ),
        layers=layers,
        score_method="loss",
        matrix=matrix(count, draw),
        plan=PlanFacts(
            dropped_attention=dropped,
            groups=tuple(tuple(group) for group in groups),
            made_by="fxfusion plan some/model",
            yaml=YAML,
        ),
        report=FusionReport(graphs=(_graph(layers, groups),)),
        quality=_quality(),
        probes=(
            ProbeRow(name="intact", solved=(("copy", 1.0), ("add", None), ("all", 1.0))),
            ProbeRow(name="fused", solved=(("copy", 0.875), ("add", None), ("all", 0.875))),
        ),
        speed=(
            SpeedRow(name="prefill, 128 tokens", ratio=_around(1.08, 0.01), control=_around(0.998, 0.009)),
            SpeedRow(name="decode, 1 token", ratio=_around(1.16, 0.02), control=_around(1.002, 0.007)),
        ),
        sweep=_sweep(draw),
        comparison=_contest(),
        samples=(Sample(prompt="def f(x):\n", reference="    return x", text="    return f(x)", agreeing=2),),
        notes=("the text has only 4 sequences: intervals are wide",),
    )


def large() -> Results:
    """126 layers, three groups, names of plans as long as real ones, a matrix of which a row is not measured yet."""
    results = everything(126, (range(50, 52), range(66, 86), range(86, 115)))
    assert results.matrix is not None
    values = [[value or None for value in row] for row in results.matrix.values]
    values[UNMEASURED] = [None] * 126
    label = "dropped 42, 50-52, 66-115; fused [50-51] [66-73] [74-85] [86-100] [101-114]"
    return replace(
        results,
        matrix=replace(results.matrix, values=tuple(map(tuple, values))),
        sweep=tuple(replace(point, label=f"{point.label} {label}") for point in results.sweep),
    )


def almost_empty() -> Results:
    return Results(model=Model(name="some/model"))


def matrix(count: int, draw: random.Random) -> Matrix:
    """Values between 2^-11 and 1 above the diagonal."""
    values = tuple(
        tuple(2.0 ** draw.uniform(-11, 0) if column > row else 0.0 for column in range(count)) for row in range(count)
    )
    return Matrix(layers=tuple(range(count)), values=values)


def _layer(number: int, groups: Sequence[Sequence[int]], count: int, draw: random.Random) -> Layer:
    group = next((index for index, group in enumerate(groups) if number in group), None)
    score = math.exp(draw.gauss(-3, 1.2))
    return Layer(
        number=number,
        mixer="kept" if group is None else "dropped",
        width=draw.choice([640, 1280, 1920]),
        group=group,
        score=Interval(score, 0.8 * score, 1.2 * score),
        cosine=0.7 + 0.25 * number / count + 0.04 * draw.random(),
        ratio=0.6 - 0.4 * number / count + 0.05 * draw.random(),
    )


def _around(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half)


def _quality() -> tuple[QualityRow, ...]:
    rows = []
    for name, loss, kl in (("intact", 3.058, 0.0), ("attention dropped", 3.42, 0.31), ("fused", 3.461, 0.335)):
        rows.append(
            QualityRow(
                name=name,
                loss=_around(loss, 0.06),
                perplexity=Interval(math.exp(loss), math.exp(loss - 0.06), math.exp(loss + 0.06)),
                loss_increase=_around(loss - 3.058, 0.015 if kl else 0.0),
                kl=_around(kl, 0.02 if kl else 0.0),
                top1=_around(1 - kl / 2, kl / 20),
                top5=_around(1 - kl / 4, kl / 40),
            )
        )
    return tuple(rows)


def _contest() -> Contest:
    entries = [
        Entry(
            method=method,
            depth=10,
            refitted=refitted,
            ffns=10,
            latency_ms=1.5,
            loss_increase=_around(kl, 0.01),
            kl=_around(kl, 0.01),
            top1=_around(1 - kl, 0.02),
            probes=0.75,
            best=refitted,
            what=f"{method} 4-6",
        )
        for method, refitted, kl in (("hoist", False, 0.21), ("hoist", True, 0.08), ("sleb", False, 0.4))
    ]
    entries.append(Entry(method="pairs", depth=10, problem="7 pairs need 14 layers, the model has 12"))
    return Contest(
        entries=tuple(entries), predicted_for="H100, tp 1, bf16", ffns=12, latency_ms=1.8, tokens=(3072, 1024)
    )


def _sweep(draw: random.Random) -> tuple[SweepPoint, ...]:
    points, best = [], math.inf
    for depth in range(6, 13):
        loss = 3.0 + (12 - depth) * 0.15 + draw.random() * 0.5
        points.append(
            SweepPoint(
                label=f"drop {12 - depth}",
                depth=depth,
                dropped=12 - depth,
                fused_bytes=(12 - depth) * 2_000_000,
                loss=_around(loss, 0.05),
                perplexity=Interval(math.exp(loss), math.exp(loss - 0.05), math.exp(loss + 0.05)),
                front=loss < best,
            )
        )
        best = min(best, loss)
    return tuple(points)


def _graph(layers: Sequence[Layer], groups: Sequence[Sequence[int]]) -> GraphReport:
    def member(number: int) -> MemberSummary:
        name = f"model.layers.{number}"
        return MemberSummary(
            name=f"{name}.mlp", layer=name, hidden=256, width=layers[number].width, source="modeling.py:164"
        )

    blocks: list[Block] = []
    for layer in layers:
        name = f"model.layers.{layer.number}"
        blocks += [Block(kind="mixer", name=name, detail="attention")] if layer.mixer == "kept" else []
        blocks.append(Block(kind="ffn", name=f"{name}.mlp", width=layer.width, group=layer.group))
    after = [block for block in blocks if block.group is None]
    after += [Block(kind="fused", name="", group=index, members=len(group)) for index, group in enumerate(groups)]
    alone = [layer for layer in layers if layer.group is None]
    return GraphReport(
        chains=tuple(
            ChainSummary(members=tuple(map(member, group)), leading=True, ended_by="attention follows")
            for group in groups
        ),
        groups=tuple(
            GroupSummary(
                members=tuple(map(member, group)),
                norm="fold",
                width=sum(layers[number].width for number in group),
                packed_bytes=2**23,
            )
            for group in groups
        ),
        refusals=tuple(
            Refusal(
                code=RefusalCode.ALONE,
                message="no neighbour to fuse with: attention comes before",
                layer=f"model.layers.{layer.number}.mlp",
                source="modeling.py:164",
            )
            for layer in alone
        ),
        history=(
            {
                "pass": "concatenate",
                "exact": True,
                "changed": 1,
                "nodes_before": 593,
                "nodes_after": 577,
                "seconds": 0.01,
                "notes": [],
            },
        ),
        verifications=({"group": 0, "dtype": "float32", "error": 3e-7, "limit": 1e-5, "passed": True},),
        blocks_before=tuple(blocks),
        blocks_after=tuple(after),
        nodes_before=593,
        nodes_after=577,
    )
