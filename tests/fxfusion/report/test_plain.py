"""`print(result)` of whatever a public function returns is a few lines, not the dump of a dataclass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfusion
from fxfusion.analysis.dependency import DependencyMatrix
from fxfusion.analysis.generation import GreedyAgreement
from fxfusion.analysis.intervals import Estimate
from fxfusion.analysis.lm_eval import TaskScore
from fxfusion.analysis.quality import Quality
from fxfusion.analysis.scores import AttentionScores, GreedyStep, LayerScore
from fxfusion.compiler.verify import Proof, Verification
from fxfusion.cost import simulate
from fxfusion.plan.fusion_plan import FusionPlan, MeasuredQuality
from fxfusion.plan.record import LayerFit, Refit
from fxfusion.planning.budget import Measured
from fxfusion.planning.sweep import Sweep, SweepPoint
from fxfusion.report.plain import lines, table

ONE = Estimate(0.5, 0.25, 0.75)
QUALITY = Quality(loss=ONE, perplexity=ONE.exp(), tokens=4096, sequences=16, kl=ONE, top1=ONE, loss_increase=ONE)
PLAN = FusionPlan(dropped_attention=[1], groups=[[4, 5, 6, 9], {"members": [10, 11], "mixers": "hoist"}])
SCORE = LayerScore(layer=3, name="model.layers.3", value=ONE, error=None)
FIT = LayerFit(name="model.layers.4.mlp.down_proj", layers=(4, 5), penalty=0.01, before=0.3, after=0.1, applied=True)
REFIT = Refit(
    reference="intact",
    later="all",
    sides="both",
    tokens=16384,
    held_out_tokens=2048,
    fingerprint="x",
    loss_before=3.5,
    loss_after=3.25,
    fits=(FIT, FIT.model_copy(update={"applied": False, "penalty": None})),
)
MATRIX = DependencyMatrix(
    values=torch.tensor([[0.0, 0.125], [0.0, 0.0]]),
    layers=(2, 3),
    names=("a", "b"),
    unit="ffn",
    cosine=torch.ones(2),
    ratio=torch.ones(2),
    contribution_cosine=torch.ones(2),
    attention=(2,),
    dropped_attention=(),
    tokens=64,
    sequences=4,
)
CHECKED = Verification(part="group 0", group=0, dtype="float32", error=1e-6, limit=1e-5)
MEASURED = Measured(PLAN, 20, 1024, QUALITY)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (QUALITY, ["loss increase", "0.5 [0.25, 0.75]", "on 4,096 tokens in 16 sequences"]),
        (AttentionScores("loss", (SCORE,), 64, 4), ["layer", "3", "0.5 [0.25, 0.75]", "rank 1: cheapest"]),
        (AttentionScores("loss", (SCORE,), 64, 4, (GreedyStep(3, SCORE, ONE, None),)), ["greedy turn"]),
        (SCORE, ["layer 3: 0.5 [0.25, 0.75]"]),
        (GreedyStep(3, SCORE, ONE, None), ["layer 3 dropped: 0.5 [0.25, 0.75] in all"]),
        (GreedyAgreement(ONE, ONE, ONE, 2, 8, ()), ["before the first difference", "after each of 2 prompts"]),
        (TaskScore({"acc": ONE}, 8), ["acc  0.5 [0.25, 0.75]", "on 8 examples"]),
        (MATRIX, ["without", "0.125", "64 tokens"]),
        (CHECKED, ["group 0: equal, off by 1e-06 of 1e-05 allowed (float32)"]),
        (Proof(rows=(CHECKED,), notes=("a note",)), ["group 0: equal", "a note"]),
        (Proof(), ["nothing was compared"]),
        (PLAN, ["attention dropped: layers 1\n", "layers whose FFNs become one: 4-6,9; 10-11 hoist (norm fold)"]),
        (FusionPlan(), ["nothing is fused"]),
        (FIT, ["model.layers.4.mlp.down_proj (out): error 0.3 -> 0.1, at penalty 0.01"]),
        (REFIT, ["refitted to the intact model on 16,384 tokens: 1 of 2 layers changed", "3.5 -> 3.25"]),
        (PLAN.replace(refit=REFIT, quality=MeasuredQuality(perplexity=21.0, tokens=64)), ["perplexity 21", "refitted"]),
        (MEASURED, ["FFN depth 20", "loss increase"]),
        (Sweep((SweepPoint(MEASURED, on_front=True),), 24), ["20 *", "10-11 hoist", "FFN depth 24"]),
    ],
)
def test_results_are_printed_as_a_few_lines(result: Any, expected: list[str]) -> None:
    text = str(result)
    assert all(part in text for part in expected), text
    assert f"{type(result).__name__}(" not in text and "Estimate(" not in text
    assert max(map(len, text.splitlines())) <= 200


def test_a_simulation_is_printed_as_a_few_lines() -> None:
    text = str(simulate("llama-3.3-70b", tp=8))
    assert "latency [ms]" in text and "on 8 " in text and "Simulation(" not in text


def test_what_is_not_there_is_left_out_and_long_tables_are_cut() -> None:
    assert lines([("a", 1), ("b", None)]) == "a  1"
    assert table(["n"], [(number,) for number in range(50)], "a note").endswith("... and 10 more\na note")


def test_print_of_what_evaluate_gives(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8))
    print(fxfusion.evaluate(model, [torch.arange(8)[None]]))
    assert "perplexity" in capsys.readouterr().out
