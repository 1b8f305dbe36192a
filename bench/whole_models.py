"""Whole decoders, reading a prompt and writing token by token: unfused, fused by the backend, fused by surgery.

    python -m bench.whole_models [--seconds 330] [--rounds 8] [--continue]
    python -m bench.whole_models --windows       models that keep all attention: bench/results/window_speed.json
    python -m bench.whole_models --windows --quick       tiny shapes: does it run? nothing is recorded

All forms lack the same attentions, so what is compared is fusing alone. Decoding uses a static cache, and CUDA graphs
on a GPU. Random weights, but for the reference model; the vocabulary of the large shapes is cut to 32,000.

Windows: a decoder of 8 layers that keeps all its attention, with windows of 2 and of 4 layers: intact, hoisted, wide.
Decoding one token with a static cache and reading a prompt of 128, float32 and bfloat16, on one thread; random weights.
The second compile of the intact model is the control. What the windowed forms give is compared, before they are timed,
with the same layers rearranged by hand and run in eager. What windows cost in quality is no matter here.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxfusion
from bench.grid import Limits, check_close, compiled, measure_limits, name_of, with_random_weights
from bench.record import Measurement, Scalar, Session, arguments, measure
from bench.show import bytes_, ratio_table, seconds, table, times
from fxfusion import FusionPlan, last_reports

STEPS = 64  # decoded before the cache is wound back to the prompt's end
PAIRS = [("unfused", "fused"), ("unfused", "surgery"), ("unfused", "unfused again")]
PREDICTIONS = {"decode": "ratios near 1 on a CPU, where weights are read no faster; compile time falls with the layers"}
CONTROL = ("intact", "intact again")
WINDOW_PREDICTIONS = {
    "CPU": "1.00x to 1.05x in float32, where weights bound the time; 1.1x to 1.25x in bfloat16, whose wide weights are "
    "kept in oneDNN's layout; wide 1 to 3 % above hoisted (one projection in and out of attention)",
    "GPU, decoding": "hoisted 1.05x to 1.15x, wide 1.1x to 1.25x: fewer and larger kernels",
}


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a Llama; half of its layers, in the middle, lose their attention and become one group."""

    name: str
    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000

    @property
    def run(self) -> list[int]:
        first = self.layers // 3
        return list(range(first, first + self.layers // 2))

    def intact(self, dtype: torch.dtype, device: str) -> Any:
        """Random weights, with all attention."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(dtype)
        return with_random_weights(model, device)

    def build(self, dtype: torch.dtype, device: str) -> Any:
        """The same without the attention of the run."""
        return fxfusion.drop_attention(self.intact(dtype, device), self.run, check=False)


SIZES = {
    "1B": Size("1B", 2048, 8192, 16, 32, 8),
    "8B": Size("8B", 4096, 14336, 32, 32, 8),
    "70B, 16 layers": Size("70B, 16 layers", 8192, 28672, 16, 64, 8),
    "8 layers": Size("8 layers", 1024, 2816, 8, 16, 4, vocabulary=4096),
    "8B, 8 layers": Size("8B, 8 layers", 4096, 14336, 8, 32, 8),
    "SmolLM2-135M": Size("SmolLM2-135M", 576, 1536, 30, 9, 3, vocabulary=49_152),
    "small": Size("small", 64, 96, 6, 4, 2, vocabulary=64),
}


@dataclass(frozen=True, slots=True)
class Case:
    """`tokens`: read at once. Decoding: after a context of so many."""

    model: str
    phase: str  # "prefill" or "decode"
    tokens: int
    dtype: torch.dtype

    @property
    def place(self) -> dict[str, str | int]:
        return {"model": self.model, "phase": self.phase, "tokens": self.tokens, "dtype": name_of(self.dtype)}


def prefill(model: Any, case: Case, compile_: Callable[..., Any]) -> Callable[[], Tensor]:
    """Reads a prompt; gives the logits of its last token."""
    ids = _ids(model, case.tokens)
    run = compile_(lambda x: model(input_ids=x, use_cache=False, logits_to_keep=1).logits)
    return lambda: run(ids)


def decode(model: Any, case: Case, compile_: Callable[..., Any]) -> Callable[[], Tensor]:
    """Writes one token more at each call, with a static cache that is wound back after `STEPS` of them."""
    cache = StaticCache(config=model.config, max_cache_len=case.tokens + STEPS)
    model(input_ids=_ids(model, case.tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
    written = [layer for layer in cache.layers if hasattr(layer, "cumulative_length")]  # others have no attention
    lengths = [layer.cumulative_length for layer in written]
    for layer in written:  # the same in all forms, whatever they make of the prompt
        for values in (layer.keys, layer.values):
            values.copy_(torch.linspace(-1, 1, values.numel(), device=values.device).sin().view(values.shape))
    ids, done = _ids(model, 1), [0]
    run = compile_(lambda x: model(input_ids=x, past_key_values=cache, use_cache=True).logits)

    def step() -> Tensor:
        if done[0] % STEPS == 0:
            for length in lengths:
                length.fill_(case.tokens)
        done[0] += 1
        found: Tensor = run(ids)
        return found

    return step


def _ids(model: Any, tokens: int) -> Tensor:
    """The same pseudo-random tokens each time: [1, tokens]."""
    draw = torch.Generator().manual_seed(tokens)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=draw).to(model.device)


@dataclass(frozen=True, slots=True)
class Pair:
    """A model without some attention, the same fused by surgery, and the plan."""

    unfused: Any
    surgery: Any
    plan: dict[str, Any]

    @classmethod
    def of(cls, model: Any, plan: dict[str, Any]) -> Pair:
        fused = copy.deepcopy(model)
        fxfusion.fuse(fused, plan, check=False)
        return cls(model, fused, plan)

    @classmethod
    def sized(cls, name: str, dtype: torch.dtype, device: str) -> Pair:
        size = SIZES[name]
        return cls.of(size.build(dtype, device), {"dropped_attention": size.run, "groups": [size.run]})

    @classmethod
    def reference(cls) -> Pair:
        from bench.reference import load_model

        plan = {"dropped_attention": [1, 4, 6, 10, 11], "groups": [[3, 4], [5, 6], [9, 10, 11]]}  # as bench.whole_path
        return cls.of(fxfusion.drop_attention(load_model(), plan["dropped_attention"]), plan)


def measure_case(case: Case, pair: Pair, limits: Limits, mode: str, *, rounds: int, threads: int) -> Measurement:
    """All forms in turn. First calls compile, each with an empty cache of Inductor's."""
    torch._dynamo.reset()
    phase = {"prefill": prefill, "decode": decode}[case.phase]
    plain, fused = (lambda f: compiled(f, mode)), (lambda f: compiled(f, mode, fused=True, plan=pair.plan))
    forms = {"unfused": (pair.unfused, plain), "fused": (pair.unfused, fused), "surgery": (pair.surgery, plain)}
    runs, facts = {}, {}
    with torch.no_grad():
        for name, (model, compile_) in forms.items():
            runs[name] = phase(model, case, compile_)
            facts |= _first_call(name, runs[name])
        runs["unfused again"] = phase(pair.unfused, case, plain)
        runs["unfused again"]()
        _check_same(runs, case)
        samples = measure(runs, rounds=rounds, threads=threads, sample_seconds=0.02)
    found = Measurement.of(case.place, samples, PAIRS)
    facts |= _limit_facts(case, dict.fromkeys(runs, pair.unfused), limits, found)
    return found.model_copy(update={"facts": facts})


def _check_same(runs: dict[str, Callable[[], Tensor]], case: Case) -> None:
    """Raises `RuntimeError` where the two fused forms, or the two unfused ones, do not give the same logits."""
    logits = {name: run().clone() for name, run in runs.items()}  # CUDA graphs write to one place
    for one, other in (("fused", "surgery"), ("unfused", "unfused again")):
        check_close(f"{case.place}: the logits of {one} against {other}", logits[one], logits[other])


def _first_call(name: str, run: Callable[[], Tensor]) -> dict[str, Scalar]:
    """Seconds until the first answer, and how much more memory was taken on the way than before."""
    gc.collect()
    before = _memory_now()
    start = time.perf_counter()
    with torch._inductor.utils.fresh_cache():
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    found = time.perf_counter() - start
    return {f"first call, {name}": round(found, 3), f"peak bytes more, {name}": _memory_peak() - before}


def _memory_now() -> int:
    """Bytes in use; the peak starts anew."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return _status("VmRSS:")


def _memory_peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _status("VmHWM:")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _limit_facts(case: Case, models: Mapping[str, Any], limits: Limits, found: Measurement) -> dict[str, Scalar]:
    """Weights are read once for a prompt or for a token; `models`: by form, of which the first is the intact one."""
    sizes = {name: _weights_read(model) for name, model in models.items()}
    count = case.tokens if case.phase == "prefill" else 1
    bounds = {name: limits.seconds(parameters, count, case.dtype) for name, parameters in sizes.items()}
    first = next(iter(models))
    facts: dict[str, Scalar] = {"bytes": sizes[first] * case.dtype.itemsize, "limit_seconds": bounds[first]}
    for name, one in found.medians.items():
        facts[f"tokens_per_second, {name}"] = float(f"{count / one.value:.5g}")
        facts[f"share of limit, {name}"] = round(bounds[name] / one.value, 4)
    return facts


def _weights_read(model: Any) -> int:
    """Parameters of all matrices; an embedding is looked up, not read."""
    head = model.get_output_embeddings().weight
    weights = {id(value): value for value in model.parameters() if value.dim() > 1}
    weights.pop(id(model.get_input_embeddings().weight), None)
    weights[id(head)] = head
    return sum(value.numel() for value in weights.values())


def show(measurements: list[Measurement]) -> str:
    rows = [
        (
            *one.place.values(),
            *(times(one.ratios[f"{slow}/{fast}"]) for slow, fast in PAIRS),
            *(seconds(float(one.facts[f"first call, {name}"] or 0)) for name in ("unfused", "fused", "surgery")),
            bytes_(float(one.facts["peak bytes more, fused"] or 0)),
        )
        for one in measurements
    ]
    heads = ["model", "phase", "tokens", "dtype", "fused", "surgery", "A/A"]
    compile_heads = [f"compile, {name}" for name in ("unfused", "fused", "surgery")]
    return table(rows, [*heads, *compile_heads, "memory more, fused"])


# --- windows of layers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WindowCase:
    """A case of a model, with windows of so many layers; each number is a candidate hoisted, and one wide.

    `dropped`: one more, which lacks the attention of the middle half of its layers; their FFNs are one.
    """

    case: Case
    lengths: tuple[int, ...]
    dropped: bool = False

    @property
    def place(self) -> dict[str, str | int]:
        return {**self.case.place, "windows": ", ".join(map(str, self.lengths))}

    @property
    def names(self) -> list[str]:
        """Of the forms that fuse."""
        windows = [f"{mixers} {length}" for length in self.lengths for mixers in ("hoist", "wide")]
        return [*windows, *(["dropped"] if self.dropped else [])]

    @property
    def ratios(self) -> list[tuple[str, str]]:
        return [*(("intact", name) for name in self.names), CONTROL]


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


def windows_of(count: int, length: int) -> list[list[int]]:
    """All of so many layers, window by window; the last one may be shorter."""
    return [list(range(first, min(first + length, count))) for first in range(0, count, length)]


def measure_windows(
    of: WindowCase,
    model: Any,
    modes: Sequence[str],
    *,
    rounds: int,
    threads: int,
    limits: Limits | None = None,
    sample_seconds: float = 0.02,
) -> Measurement:
    """All forms of one case in the first mode, and the intact one in the others, interleaved; `limits`: for shares.

    Raises `RuntimeError` where one computes something else than it is called.
    """
    torch._dynamo.reset()
    (mode, *others), size = modes or ("default",), SIZES[of.case.model]
    phase = {"prefill": prefill, "decode": decode}[of.case.phase]
    ratios = [*of.ratios, *((f"intact, {other}", name) for other in others for name in of.names)]
    models = dict.fromkeys(("intact", *dict.fromkeys(name for pair in ratios for name in pair)), model)
    with torch.no_grad():
        if of.dropped:
            models["dropped"] = fxfusion.drop_attention(copy.deepcopy(model), size.run, check=False)
        runs: dict[str, Callable[[], Tensor]] = {}
        for name, one in models.items():
            wanted, own = _by_hand(of.case, phase, one, name), name.partition(", ")[2] or mode
            runs[name] = phase(one, of.case, lambda f, name=name, own=own: _compiled(f, own, size, name))
            _check(of, name, runs[name](), wanted)
        samples = measure(runs, rounds=rounds, threads=threads, sample_seconds=sample_seconds)
    found = Measurement.of(of.place, samples, ratios)
    facts = {} if limits is None else _limit_facts(of.case, models, limits, found)
    return found.model_copy(update={"facts": facts})


def plan_of(size: Size, name: str) -> FusionPlan | None:
    """The plan of a candidate such as `hoist 2` or `dropped`; None: as it is."""
    mixers, _, length = name.partition(" ")
    if name.startswith("intact"):
        return None
    if name == "dropped":
        return FusionPlan(dropped_attention=size.run, groups=[size.run])
    return FusionPlan(groups=[{"members": window, "mixers": mixers} for window in windows_of(size.layers, int(length))])


def _compiled(run: Callable[..., Any], mode: str, size: Size, name: str) -> Callable[..., Any]:
    plan = plan_of(size, name)
    return compiled(run, mode) if plan is None else compiled(run, mode, fused=True, plan=plan)


def _by_hand(case: Case, phase: Callable[..., Callable[[], Tensor]], model: Any, name: str) -> Tensor:
    """Logits of a form in eager; of a dropped one the model lacks the attention already."""
    size = SIZES[case.model]
    plan = plan_of(size, name)
    if plan is None:
        return phase(model, case, lambda f: f)().float()
    windows = [[int(member) for member in group] for group in plan.groups]
    alone = [[layer] for layer in range(size.layers) if not any(layer in window for window in windows)]
    with rearranged(model, sorted(windows + alone), wide=name.startswith("wide")):
        return phase(model, case, lambda f: f)().float()


def _check(of: WindowCase, name: str, found: Tensor, wanted: Tensor) -> None:
    check_close(f"{of.place}: the logits of {name}", found, wanted)
    plan = plan_of(SIZES[of.case.model], name)
    if plan is not None and len(last_reports()[-1].groups) != len(plan.groups):
        raise RuntimeError(f"{of.place}: {name} has {len(last_reports()[-1].groups)} groups of {len(plan.groups)}")


def cases(small: bool) -> Iterator[WindowCase]:
    """Most important first."""
    name, lengths = ("small", (2,)) if small else ("8 layers", (2, 4))
    for phase, tokens in (("decode", 8 if small else 64), ("prefill", 16 if small else 128)):
        for dtype in (torch.bfloat16, torch.float32):
            yield WindowCase(Case(name, phase, tokens, dtype), lengths)


def window_columns(found: Sequence[Measurement]) -> list[tuple[str, str]]:
    """Headings: how many times as fast as the intact model."""
    names = dict.fromkeys(name for one in found for name in one.ratios)
    shown: Mapping[str, str] = {"/".join(CONTROL): "A/A"}
    return [(name, shown.get(name) or name.partition("/")[2]) for name in names]


# --- the command ---------------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__, seconds=330.0)
    parser.add_argument("--windows", action="store_true", help="models that keep all their attention")
    parser.add_argument("--quick", action="store_true", help="with --windows: tiny shapes, nothing recorded")
    parser.add_argument("--rounds", type=int, help="default: 8, of windows 12")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.windows and chosen.quick:
        found = [_windows_on_the_cpu(of, 3) for of in cases(small=True)]
        print(ratio_table(found, window_columns(found)))
        return
    name = "window_speed" if chosen.windows else "whole_models"
    with Session(name, seconds=chosen.seconds, fresh=not chosen.go_on) as session:
        if chosen.windows:
            session.predictions = WINDOW_PREDICTIONS
            for of in cases(small=False):
                session.do(of.place, partial(_windows_on_the_cpu, of, chosen.rounds or 12), needs=75.0)
            print(ratio_table(session.measurements, window_columns(session.measurements)))
            return
        limits = measure_limits("cpu")
        session.results["limits"] = limits.to_dict()
        session.predictions = PREDICTIONS
        for case, needs in ON_THE_CPU:
            session.do(case.place, partial(_on_the_cpu, case, limits, chosen.rounds or 8), needs=needs)
        print(show(session.measurements))


# Most important first, and the seconds that each needs.
ON_THE_CPU = (
    (Case("1B", "decode", 32, torch.bfloat16), 90.0),
    (Case("reference", "decode", 64, torch.float32), 70.0),
    (Case("reference", "prefill", 256, torch.float32), 70.0),
    (Case("1B", "prefill", 32, torch.bfloat16), 90.0),
)


def _on_the_cpu(case: Case, limits: Limits, rounds: int) -> Measurement:
    pair = Pair.reference() if case.model == "reference" else Pair.sized(case.model, case.dtype, "cpu")
    return measure_case(case, pair, limits, "default", rounds=rounds, threads=1)


def _windows_on_the_cpu(of: WindowCase, rounds: int) -> Measurement:
    return measure_windows(of, SIZES[of.case.model].intact(of.case.dtype, "cpu"), (), rounds=rounds, threads=1)


if __name__ == "__main__":
    main()
