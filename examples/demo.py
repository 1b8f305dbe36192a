"""The main job from end to end on the trained reference model: `make demo`, or `python -m examples.demo` in a clone.

Attention is removed from some middle layers, the FFNs left there form a chain, the compiler fuses it,
and the demo shows what was found, that the rewrite is exact, what it cost in quality and what it gained.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.reference import HELD_OUT_FILE, MODEL_FOLDER, heldout_batches, load_model
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.backend import ffn_fusion, last_reports
from fxfusion.cli import main, new_app
from fxfusion.cli.options import Compiler, CompilerOption
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import Run, command
from fxfusion.cli.timing import call_of
from fxfusion.compiler.pipeline import explain as explain_model
from fxfusion.cost import interleaved
from fxfusion.errors import FxFusionError
from fxfusion.files import check_file
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
_NEEDED = ("config.json", "model.safetensors", HELD_OUT_FILE)

Logits = Callable[[Tensor], Tensor]
ModelDir = Annotated[Path, typer.Option("--model", help="Folder of the reference model.")]
Output = Annotated[Path, typer.Option(help="Where to write the report.")]
Sequences = Annotated[int, typer.Option(min=8, help="Held-out sequences of 256 tokens that quality is measured on.")]
Rounds = Annotated[int, typer.Option(min=5, help="Timing rounds.")]


@command
def demo(
    run: Run,
    model: ModelDir = MODEL_FOLDER,
    output: Output = Path("fxfusion_report.html"),
    compiler: CompilerOption = Compiler.inductor,
    sequences: Sequences = 48,
    rounds: Rounds = 40,
) -> dict[str, Any]:
    """Take a trained model through the whole of fxfusion: find, fuse, prove, measure (under 3 minutes)."""
    check_model(model)
    check_file(output, "report", overwrite=run.overwrite, reads=[model])
    started = time.perf_counter()
    settings = Settings(
        folder=model, html=output, overwrite=run.overwrite, compiler=compiler.value, sequences=sequences, rounds=rounds
    )
    with torch.no_grad():
        result = all_steps(settings, run.screen)
    result["seconds"] = time.perf_counter() - started
    run.screen.line(f"\nDone in {result['seconds']:.0f} s.")
    run.exit_code = 0 if result["exactness"]["passed"] else 1
    return result


def check_model(folder: Path) -> None:
    """Raises `FxFusionError` that says what is missing."""
    missing = next((name for name in _NEEDED if not (folder / name).is_file()), None)
    if missing is not None:
        raise FxFusionError(f"--model {folder}: the folder has no {missing}; `make demo` runs in a whole clone")


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


def all_steps(settings: Settings, screen: Screen) -> dict[str, Any]:
    """In order; what they measured, ready for JSON."""
    subject = load(settings, screen)
    drop_attention(subject, screen)
    explain(subject, screen)
    compile_and_prove(subject, settings, screen)
    measure_quality(subject, screen)
    measure_speed(subject, settings, screen)
    write_report(subject, settings, screen)
    summarise(subject, screen)
    return subject.result


def load(settings: Settings, screen: Screen) -> Subject:
    screen.step(1, "A trained model", "A small language model, trained on Python source code.")
    with screen.busy("loading it and measuring its perplexity on held-out files"):
        model = load_model(folder=settings.folder)
        model.config.use_cache = False
        batches = heldout_batches(_BATCH, _LENGTH, settings.sequences // _BATCH, settings.folder)
        subject = Subject(intact=model, dropped=drop(copy.deepcopy(model), DROPPED), batches=batches)
        quality = subject.measure("intact", model)
    parameters = sum(weight.numel() for weight in model.parameters())
    subject.result["model"] = {"folder": str(settings.folder), "parameters": parameters, "tokens": quality.tokens}
    screen.line(f"{len(layers_of(model))} layers, {parameters / 1e6:.1f} M parameters")
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
        witness = parallel_form(subject.dropped, [GROUP], PLAN.norm)
        error = relative_error(call_of(witness)(ids), ours)
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
    with one_weight_changed(subject.dropped, GROUP[0]):
        changed = relative_error(expected, subject.fused(ids))
    return changed, relative_error(expected, subject.fused(ids))


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
    screen.step(7, "Look at it", "A map of the layers, with every refusal and every pass.")
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
        ("residual blocks", f"{counts['blocks_before']} -> {counts['blocks_after']}"),
        ("rewrite exact", "yes" if result["exactness"]["passed"] else "NO"),
        ("perplexity, unfused -> fused", f"{shown(quality['attention_removed'])} -> {shown(quality['fused_fold'])}"),
        *((f"speed, {name}", f"{interleaved.Ratio(**found['fused'])}") for name, found in result["speed"].items()),
    ]
    screen.table(("", ""), rows)


def compiled(model: nn.Module, options: dict[str, Any]) -> Logits:
    """The model compiled by fxfusion, as a function from ids to logits."""
    return torch.compile(call_of(model), backend=ffn_fusion, options=options, dynamic=False)


def shown(quality: Quality) -> str:
    return f"{float(quality.perplexity):.2f} {interval(quality)}"


def interval(quality: Quality) -> str:
    return f"[{quality.perplexity.low:.2f}, {quality.perplexity.high:.2f}]"


# --- the parallel form in plain modules ----------------------------------------------------------------
# Tied to the module names of the reference model. Nothing here uses the compiler, so the parallel form is an
# independent witness of what the compiler makes.


class SumOfFfns(nn.Module):
    """`F1(n1(x)) + F2(n2(x)) + ...`, every branch on the same input `x: [..., hidden]`."""

    def __init__(self, norms: Sequence[nn.Module], ffns: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms, self.ffns = nn.ModuleList(norms), nn.ModuleList(ffns)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            total = total + ffn(norm(x))
        return total


class Nothing(nn.Module):
    """An FFN that is computed elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def parallel_form(model: nn.Module, groups: Sequence[Sequence[int]], norm: str) -> nn.Module:
    """A copy of the model whose groups of layers read one input, in plain modules, for eager mode.

    `norm`: `"fold"` gives every member its own norm, `"last"` the norm of the group's last member.
    """
    copied = copy.deepcopy(model)
    layers = layers_of(copied)
    for group in groups:
        members = [layers[number] for number in group]
        own = [member.get_submodule("post_attention_layernorm") for member in members]
        norms = own if norm == "fold" else [own[-1]] * len(own)
        together = SumOfFfns(norms, [member.get_submodule("mlp") for member in members])
        for member in members:
            member.post_attention_layernorm, member.mlp = nn.Identity(), Nothing()
        members[0].mlp = together
    return copied


@contextmanager
def one_weight_changed(model: nn.Module, layer: int) -> Iterator[None]:
    """Inside, one single weight of one FFN is off by the largest weight of its matrix."""
    weight = layers_of(model)[layer].get_parameter("mlp.down_proj.weight")
    with torch.no_grad():
        saved = weight[0, 0].clone()
        weight[0, 0] += weight.abs().max()
        try:
            yield
        finally:
            weight[0, 0] = saved


def relative_error(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    first, second = one.detach().double(), other.detach().double()
    return float((first - second).abs().max() / first.abs().max())


app = new_app()
app.command()(demo)

if __name__ == "__main__":
    main(app)
