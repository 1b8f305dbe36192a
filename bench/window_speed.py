"""A decoder of 8 layers that keeps all its attention, with windows of 2 and of 4 layers: intact, hoisted, wide.

    python -m bench.window_speed [--seconds 330] [--rounds 12] [--continue]
    python -m bench.window_speed --quick            tiny shapes: does it run? nothing is recorded

Decoding one token with a static cache and reading a prompt of 128, float32 and bfloat16, on one thread; random weights.
The second compile of the intact model is the control. What the windowed forms give is compared, before they are timed,
with the same layers rearranged by hand and run in eager. What windows cost in quality is no matter here (issue 7).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.budget import Session
from bench.chains import compiled
from bench.record import Measurement
from bench.tables import ratio_table
from bench.timing import measure
from bench.whole_models import SIZES, Case, Size, decode, prefill
from fxfusion import FusionPlan, last_reports

MODELS = {
    "8 layers": Size("8 layers", 1024, 2816, 8, 16, 4, vocabulary=4096),
    "8B, 8 layers": Size("8B, 8 layers", 4096, 14336, 8, 32, 8),
    "small": SIZES["small"],
}
CONTROL = ("intact", "intact again")
PREDICTIONS = {
    "CPU": "1.00x to 1.05x in float32, where weights bound the time; 1.1x to 1.25x in bfloat16, whose wide weights are "
    "kept in oneDNN's layout; wide 1 to 3 % above hoisted (one projection in and out of attention)",
    "GPU, decoding": "hoisted 1.05x to 1.15x, wide 1.1x to 1.25x: fewer and larger kernels",
}


@dataclass(frozen=True, slots=True)
class WindowCase:
    """A case of a model, with windows of so many layers; each number is a candidate hoisted, and one wide."""

    case: Case
    lengths: tuple[int, ...]

    @property
    def place(self) -> dict[str, str | int]:
        return {**self.case.place, "windows": ", ".join(map(str, self.lengths))}

    @property
    def ratios(self) -> list[tuple[str, str]]:
        names = [f"{mixers} {length}" for length in self.lengths for mixers in ("hoist", "wide")]
        return [*(("intact", name) for name in names), CONTROL]


class ByHand(nn.Module):
    """The layers of a window in eager: their attentions, then the sum of their FFNs."""

    def __init__(self, layers: Sequence[Any], wide: bool) -> None:
        super().__init__()
        self.layers, self.wide = nn.ModuleList(layers), wide

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        layers: Any = self.layers
        x = entry = hidden_states
        for layer in layers:
            read = layer.input_layernorm(entry if self.wide else x)
            x = x + layer.self_attn(hidden_states=read, **given)[0]
        total = x
        for layer in layers:
            total = total + layer.mlp(layer.post_attention_layernorm(x))
        return total


@contextmanager
def rearranged(model: Any, windows: Sequence[Sequence[int]], wide: bool) -> Iterator[None]:
    """The model computes its windows by hand inside. Not to be compiled: afterwards its layers are as they were."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(ByHand([layers[number] for number in window], wide) for window in windows)
    try:
        yield
    finally:
        model.model.layers = layers


def windows_of(model: Any, length: int) -> list[list[int]]:
    """All layers, window by window; the last one may be shorter."""
    count = len(model.model.layers)
    return [list(range(first, min(first + length, count))) for first in range(0, count, length)]


def measure_windows(
    of: WindowCase, model: Any, modes: Sequence[str], *, rounds: int, threads: int, sample_seconds: float = 0.02
) -> Measurement:
    """All forms of one case, interleaved. Raises `RuntimeError` where one computes something else than it is called."""
    torch._dynamo.reset()
    mode = modes[-1] if modes else "default"
    phase = {"prefill": prefill, "decode": decode}[of.case.phase]
    with torch.no_grad():
        wanted = {name: _by_hand(of.case, phase, model, name) for _, name in of.ratios}
        runs: dict[str, Callable[[], Tensor]] = {"intact": phase(model, of.case, lambda f: compiled(f, mode))}
        for _, name in of.ratios:
            runs[name] = phase(model, of.case, lambda f, name=name: _compiled(f, mode, model, name))
            _check(of, name, runs[name](), wanted[name], model)
        samples = measure(runs, rounds=rounds, threads=threads, sample_seconds=sample_seconds)
    return Measurement.of(of.place, samples, of.ratios)


def _plan(model: Any, name: str) -> FusionPlan | None:
    """The plan of a candidate such as `hoist 2`; None: as it is."""
    mixers, _, length = name.partition(" ")
    if mixers == "intact":
        return None
    return FusionPlan(groups=[{"members": window, "mixers": mixers} for window in windows_of(model, int(length))])


def _compiled(run: Callable[..., Any], mode: str, model: Any, name: str) -> Callable[..., Any]:
    plan = _plan(model, name)
    return compiled(run, mode) if plan is None else compiled(run, mode, fused=True, plan=plan)


def _by_hand(case: Case, phase: Callable[..., Callable[[], Tensor]], model: Any, name: str) -> Tensor:
    """Logits of a form in eager."""
    plan = _plan(model, name)
    if plan is None:
        return phase(model, case, lambda f: f)().float()
    windows = [[int(member) for member in group] for group in plan.groups]
    with rearranged(model, windows, wide=name.startswith("wide")):
        return phase(model, case, lambda f: f)().float()


def _check(of: WindowCase, name: str, found: Tensor, wanted: Tensor, model: Any) -> None:
    limit = 0.05 if of.case.dtype == torch.bfloat16 else 1e-3
    error = float((found.float() - wanted).norm() / wanted.norm())
    if not error <= limit:
        raise RuntimeError(f"{of.place}: the logits of {name} are off by {error:.2g}, allowed {limit}")
    plan = _plan(model, name)
    if plan is not None and len(last_reports()[-1].groups) != len(plan.groups):
        raise RuntimeError(f"{of.place}: {name} has {len(last_reports()[-1].groups)} groups of {len(plan.groups)}")


def cases(small: bool) -> Iterator[WindowCase]:
    """Most important first."""
    name, lengths = ("small", (2,)) if small else ("8 layers", (2, 4))
    for phase, tokens in (("decode", 8 if small else 64), ("prefill", 16 if small else 128)):
        for dtype in (torch.bfloat16, torch.float32):
            yield WindowCase(Case(name, phase, tokens, dtype), lengths)


def columns(found: Sequence[Measurement]) -> list[tuple[str, str]]:
    """Headings: how many times as fast as the intact model."""
    names = dict.fromkeys(name for one in found for name in one.ratios)
    shown: Mapping[str, str] = {"/".join(CONTROL): "A/A"}
    return [(name, shown.get(name) or name.partition("/")[2]) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=330.0, help="no case is begun that would end after that")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds, nothing recorded")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the cases of an earlier run")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if chosen.quick else chosen.rounds

    def measured(of: WindowCase) -> Measurement:
        model = MODELS[of.case.model].intact(of.case.dtype, "cpu")
        return measure_windows(of, model, (), rounds=rounds, threads=1)

    if chosen.quick:
        found = [measured(of) for of in cases(small=True)]
    else:
        with Session("window_speed", seconds=chosen.seconds, fresh=not chosen.go_on) as session:
            session.predictions = PREDICTIONS
            for of in cases(small=False):
                session.do(of.place, lambda of=of: measured(of), needs=75.0)
        found = session.measurements
    print(ratio_table(found, columns(found)))


if __name__ == "__main__":
    main()
