"""The steps of the demo. Each reads and extends one `Subject`, and prints what it found."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.backend import ffn_fusion, last_reports
from fxfusion.cli import reference, surgery
from fxfusion.cli.screen import Screen
from fxfusion.compiler.pipeline import explain as explain_model
from fxfusion.cost import interleaved
from fxfusion.models.drop_attention import drop_attention as drop
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.report import FusionReport
from fxfusion.report.text import chains, groups, refusals

DROPPED = (4, 5, 6, 7, 8)  # the run of five that costs the reference model least
GROUP = (4, 5, 6, 7, 8)
PLAN = FusionPlan(dropped_attention=DROPPED, groups=(GROUP,))
PLAN_LAST = FusionPlan(dropped_attention=DROPPED, groups=(GROUP,), norm="last")

_LENGTH, _BATCH = 256, 8  # of the held-out rows
_PREFILL, _DECODE = 128, 1  # tokens per call in the speed test
_LIMIT = 1e-5  # relative, float32: the contract for the rewrite
_serial = count()

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`compiler` compiles both the fused and the unfused model. `rounds`: samples per timed callable."""

    folder: Path
    html: Path
    overwrite: bool
    compiler: str
    sequences: int
    rounds: int


@dataclass(slots=True, kw_only=True)
class Subject:
    """The models of the demo, and what was measured so far. `fused` is None before it is compiled."""

    intact: nn.Module
    dropped: nn.Module
    batches: list[Tensor]
    quality: dict[str, Quality] = field(default_factory=dict)
    fused: Logits | None = None
    report: FusionReport | None = None
    result: dict[str, Any] = field(default_factory=dict)

    def measure(self, name: str, model: nn.Module | Logits) -> Quality:
        found = self.quality[name] = evaluate(model, self.batches)
        self.result.setdefault("quality", {})[name] = found.to_dict()
        return found


def load(settings: Settings, screen: Screen) -> Subject:
    screen.step(1, "A trained model", "A small language model, trained on Python source code.")
    with screen.busy("loading it and measuring its perplexity on held-out files"):
        model = reference.load(settings.folder)
        batches = reference.held_out(settings.folder, settings.sequences, _LENGTH, _BATCH)
        subject = Subject(intact=model, dropped=drop(copy.deepcopy(model), DROPPED), batches=batches)
        quality = subject.measure("intact", model)
    parameters = sum(weight.numel() for weight in model.parameters())
    subject.result["model"] = {"folder": str(settings.folder), "parameters": parameters, "tokens": quality.tokens}
    screen.line(f"{len(surgery.layers_of(model))} layers, {parameters / 1e6:.1f} M parameters")
    screen.line(f"perplexity {shown(quality)} (95 % interval) on {quality.tokens:,} held-out tokens")
    return subject


def drop_attention(subject: Subject, screen: Screen) -> None:
    text = "fxfusion.drop_attention(model, layers): FFNs then follow one another, a chain. Nothing is retrained here."
    screen.step(2, f"Remove the attention of layers {DROPPED[0]} to {DROPPED[-1]}", text)
    with screen.busy("measuring"):
        quality = subject.measure("attention_removed", subject.dropped)
    subject.result["dropped_attention"] = list(DROPPED)
    screen.line(f"perplexity {shown(quality)}, before {shown(subject.quality['intact'])}")


def explain(subject: Subject, screen: Screen) -> None:
    screen.step(3, "What can be fused, and what not", "fxfusion.explain(model, input_ids, plan=plan)")
    with screen.busy("capturing the graph"):
        report = explain_model(call_of(subject.dropped), subject.batches[0][:1, :_PREFILL], plan=PLAN)
    screen.line(f"{report.main.nodes_before} graph nodes, {report.summary['blocks_before']} residual blocks\n")
    for table in (chains, groups, refusals):
        screen.line(table(report.main) + "\n")


def compile_and_prove(subject: Subject, settings: Settings, screen: Screen) -> None:
    text = "torch.compile(model, backend=ffn_fusion, options={'plan': plan, 'verify': 'numeric', 'strict': True})"
    screen.step(4, "Compile, and prove that the rewrite is exact", text)
    options = {"plan": PLAN, "verify": "numeric", "strict": True, "compiler": settings.compiler}
    ids = subject.batches[0][:1, :_PREFILL]
    with screen.busy(f"compiling with {settings.compiler}"):
        subject.fused = compiled(subject.dropped, options)
        ours = subject.fused(ids)
        subject.report = last_reports()[-1]
        witness = surgery.parallel_form(subject.dropped, [GROUP], PLAN.norm)
        error = surgery.relative_error(call_of(witness)(ids), ours)
        changed_error, restored_error = _perturb(subject, witness, ids)
    proofs = subject.report.verifications
    for proof in proofs:
        text = f"{proof['part']} against the parallel form: {proof['error']:.1e}, allowed {proof['limit']:.0e}"
        screen.verdict(bool(proof["passed"]), text)
    screen.verdict(error <= _LIMIT, f"all logits against a parallel form in plain modules: {error:.1e}, allowed 1e-05")
    text = f"with one weight changed the comparison fails, as it must: {changed_error:.1e}, above 1e-05"
    screen.verdict(changed_error > _LIMIT, text)
    screen.verdict(restored_error <= _LIMIT, f"and passes when the weight is restored: {restored_error:.1e}")
    passed = bool(proofs) and all(proof["passed"] for proof in proofs)
    passed = passed and max(error, restored_error) <= _LIMIT < changed_error
    subject.result["exactness"] = {
        "passed": passed,
        "limit": _LIMIT,
        "proofs": list(proofs),
        "logits": error,
        "logits_with_a_changed_weight": changed_error,
        "logits_with_the_weight_restored": restored_error,
    }


def _perturb(subject: Subject, witness: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Errors against the witness while one weight of the compiled model is changed, and afterwards.

    The compiled model reads packed copies of the weights: that it follows the change is part of the test.
    """
    assert subject.fused is not None
    expected = call_of(witness)(ids)
    with surgery.one_weight_changed(subject.dropped, GROUP[0]):
        changed = surgery.relative_error(expected, subject.fused(ids))
    return changed, surgery.relative_error(expected, subject.fused(ids))


def measure_quality(subject: Subject, screen: Screen) -> None:
    text = "Fusing is exact up to the parallel form; reading one input instead of a chain is an approximation."
    screen.step(5, "What it costs in quality", text)
    variants: dict[str, dict[str, Any]] = {
        "fused_fold": {"plan": PLAN},
        "fused_last": {"plan": PLAN_LAST},
        "fused_paper": {"policy": "paper"},
    }
    with screen.busy("measuring three ways to fuse"):
        for name, options in variants.items():
            subject.measure(name, compiled(subject.dropped, {**options, "compiler": "eager", "strict": True}))
    names = {
        "intact": "intact model",
        "attention_removed": f"attention removed from {len(DROPPED)} layers",
        "fused_fold": f'  fused, {len(GROUP)} FFNs in one, own norms (norm="fold")',
        "fused_last": '  fused, the same FFNs, one norm (norm="last")',
        "fused_paper": '  fused by the rule of the paper (policy="paper")',
    }
    base = float(subject.quality["attention_removed"].loss)
    rows = [
        (names[name], f"{float(found.perplexity):.2f}", interval(found), f"{float(found.loss) - base:+.3f}")
        for name, found in subject.quality.items()
    ]
    screen.table(("", "perplexity", "95 % interval", "loss [nats]"), rows)
    screen.line("loss: per token, against the unfused model without those attentions", "dim")


def measure_speed(subject: Subject, settings: Settings, screen: Screen) -> None:
    text = "Fused against unfused, both compiled alike; timed in random order, with an identical copy as control."
    screen.step(6, "What it gains in speed", text)
    rows = []
    for name, tokens in (("prefill", _PREFILL), ("decode", _DECODE)):
        with screen.busy(f"compiling and timing calls of {tokens} token{'s' if tokens > 1 else ''}"):
            found = _time(subject, settings, tokens)
        subject.result.setdefault("speed", {})[name] = found
        values = {key: interleaved.Ratio(**found[key]) for key in ("fused", "control")}
        milliseconds = [f"{found[key] * 1e3:.2f}" for key in ("unfused_seconds", "fused_seconds")]
        rows.append((f"{tokens} token{'s' if tokens > 1 else ''} a call", *milliseconds, *values.values()))
    screen.table(("", "unfused ms", "fused ms", "times faster [95 %]", "control [95 %]"), rows)
    screen.line("The whole model is timed; what was fused is a part of it.", "dim")


def _time(subject: Subject, settings: Settings, tokens: int) -> dict[str, Any]:
    ids = subject.batches[0][:1, :tokens]
    fused = subject.fused
    if fused is None or tokens != _PREFILL:
        fused = compiled(subject.dropped, {"plan": PLAN, "compiler": settings.compiler})
    # One function per shape and kind, so that all have the same guards to check before a call.
    unfused = torch.compile(call_of(subject.dropped), backend=settings.compiler, dynamic=False)
    calls = {"unfused": lambda: unfused(ids), "fused": lambda: fused(ids), "control": lambda: unfused(ids)}
    samples = interleaved.sample(calls, settings.rounds)
    return {
        "tokens": tokens,
        "unfused_seconds": interleaved.median(samples["unfused"]),
        "fused_seconds": interleaved.median(samples["fused"]),
        "fused": interleaved.ratio(samples["unfused"], samples["fused"]).to_dict(),
        "control": interleaved.ratio(samples["unfused"], samples["control"]).to_dict(),
    }


def write_report(subject: Subject, settings: Settings, screen: Screen) -> None:
    screen.step(7, "Look at it", "A map of the model before and after, with every refusal and every pass.")
    assert subject.report is not None
    path = subject.report.to_html(settings.html, title="fxfusion demo", overwrite=settings.overwrite).resolve()
    subject.result["html"] = str(path)
    subject.result["report"] = subject.report.to_dict()
    screen.line(f"open {path}")


def summarise(subject: Subject, screen: Screen) -> None:
    result, quality = subject.result, subject.quality
    screen.line("\nSummary", "bold cyan")
    counts = result["report"]["summary"]
    rows = [
        ("residual blocks in a row", f"{counts['blocks_before']} -> {counts['blocks_after']}"),
        ("rewrite exact", "yes" if result["exactness"]["passed"] else "NO"),
        ("perplexity, unfused -> fused", f"{shown(quality['attention_removed'])} -> {shown(quality['fused_fold'])}"),
        *((f"speed, {name}", f"{interleaved.Ratio(**found['fused'])}") for name, found in result["speed"].items()),
    ]
    screen.table(("", ""), rows)


def compiled(model: nn.Module, options: dict[str, Any]) -> Logits:
    """The model compiled by fxfusion, as a function from ids to logits."""
    return torch.compile(call_of(model), backend=ffn_fusion, options=options, dynamic=False)


def call_of(model: nn.Module) -> Logits:
    """A function from ids `[batch, seq]` to logits, with a code object of its own.

    Dynamo keeps what it compiled by code object, and looks through all of it at each call: functions that
    are compared in speed must not share one.
    """

    def call(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits

    code = call.__code__.replace(co_name=f"model_{next(_serial)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def shown(quality: Quality) -> str:
    return f"{float(quality.perplexity):.2f} {interval(quality)}"


def interval(quality: Quality) -> str:
    return f"[{quality.perplexity.low:.2f}, {quality.perplexity.high:.2f}]"
