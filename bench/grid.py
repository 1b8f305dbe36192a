"""Chains of FFNs in real shapes: fused against everything a user would pick instead, and against the limit.

    python -m bench.grid [--seconds 150] [--rounds 12] [--continue]

Every form that a user could run a chain in, with the same weights, input and Inductor settings:

    eager                 the modules one after the other
    unfused               torch.compile of that; "unfused again" is the control that must show no difference
    fused                 torch.compile(backend=ffn_fusion)
    surgery               fxfusion.fuse on the modules, then plain torch.compile
    concatenated by call  the wide FFN made from the members' weights inside the graph, at each call

Each compiled form also comes in Inductor's other modes, such as "fused, max-autotune". On the CPU a small part: chains
of 8 in the smallest real shape, and longer and shorter ones. The whole grid is for a GPU: `python -m bench.gpu`.
"""

from __future__ import annotations

import copy
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import fxfusion
from bench.record import Measurement, Scalar, Session, arguments, measure
from bench.show import ratio_table
from fxfusion.cost.layer_table import LayerTable

LENGTHS = (2, 4, 8, 15)
TOKENS = (1, 4, 16, 64, 256, 2048)
DTYPES = (torch.bfloat16, torch.float32)
NEEDS = 45.0  # seconds of one cell on two shared cores
PREDICTIONS = {
    "1 token": "fused, surgery and unfused within 5 % of each other: all read the same bytes",
    "concatenated by call": "slower than unfused at 1 token by 2x or more: it reads, writes and reads every weight",
    "share of the limit": "0.6 to 0.9 at 1 token in float32, less in bfloat16",
}
Run = Callable[[Tensor], Tensor]
_serial = count()

# --- what is measured: shapes of real FFNs, of one device where a model is cut ------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """An FFN of `hidden` channels; `widths`: intermediate channels of the members in turn, from the first again."""

    name: str
    hidden: int
    widths: tuple[int, ...]

    def members(self, length: int) -> list[int]:
        return [self.widths[number % len(self.widths)] for number in range(length)]


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid."""

    shape: Shape
    length: int
    tokens: int
    dtype: torch.dtype

    @property
    def place(self) -> dict[str, str | int]:
        members = {"shape": self.shape.name, "members": self.length}
        return {**members, "tokens": self.tokens, "dtype": name_of(self.dtype)}

    @property
    def parameters(self) -> int:
        """Of the linear layers, which are read once for each batch of tokens."""
        return 3 * self.shape.hidden * sum(self.shape.members(self.length))


_70B, _405B, _SUPER = map(LayerTable.published, ("llama-3.3-70b", "llama-3.1-405b", "nemotron-super-49b"))
# Name, hidden, widths. The run of Super-49B are the FFNs of its layers 53-70.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("70B / 8", _70B.hidden_size, ((_70B.layers[0].ffn_width or 0) // 8,)),
        Shape("Super-49B, run", _SUPER.hidden_size, tuple(layer.ffn_width or 0 for layer in _SUPER.layers[53:71])),
        Shape("405B / 8", _405B.hidden_size, ((_405B.layers[0].ffn_width or 0) // 8,)),
        Shape("Super-49B, 2816", 8192, (2816,)),
        Shape("Super-49B, 7168", 8192, (7168,)),
        Shape("8B", 4096, (14336,)),
        Shape("1B", 2048, (8192,)),
    )
}
# Never part of a published result: what the test of the scripts runs.
SMALL = {"small": Shape("small", 64, (96,)), "small, unequal": Shape("small, unequal", 64, (96, 64))}


def grid(shapes: dict[str, Shape] = SHAPES) -> Iterator[Cell]:
    """All cells, what matters most first: decoding in chains of 8 in bfloat16, then more tokens, then the others."""
    seen: set[Cell] = set()
    for lengths, tokens, dtypes in (
        ((8,), (1,), (torch.bfloat16,)),
        ((8,), (16, 4), (torch.bfloat16,)),
        ((8,), (64, 256, 2048), (torch.bfloat16,)),
        ((2, 4, 15), (1, 16), (torch.bfloat16,)),
        ((8,), (1, 16, 256), (torch.float32,)),
        (LENGTHS, TOKENS, DTYPES),
    ):
        for dtype, length, number, shape in product(dtypes, lengths, tokens, shapes.values()):
            cell = Cell(shape, length, number, dtype)
            if cell not in seen:
                seen.add(cell)
                yield cell


# --- the limit -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """`bandwidth`: bytes read per second; `rate`: floating-point operations per second of one large product.

    A model of few tokens cannot be faster than its weights are read, one of many not faster than its products are
    computed. Memory that is read was written before: pages that never were are one page of zeros, read from the cache.
    """

    bandwidth: float
    rate: dict[torch.dtype, float]

    def seconds(self, parameters: int, tokens: int, dtype: torch.dtype) -> float:
        """The least time in which `parameters` weights can be read and multiplied with so many tokens."""
        return max(parameters * dtype.itemsize / self.bandwidth, 2 * parameters * tokens / self.rate[dtype])

    def to_dict(self) -> dict[str, object]:
        rates = {name_of(dtype): rate for dtype, rate in self.rate.items()}
        return {"bandwidth_bytes_per_second": self.bandwidth, "operations_per_second": rates}


def measure_limits(device: str, *, small: bool = False) -> Limits:
    """What the machine can do at most, measured in the same run; takes a few seconds."""
    gpu = device != "cpu"
    size = 2**22 if small else 2**31 if gpu else 2**28  # bytes; far more than a cache holds
    side = 256 if small else 8192 if gpu else 1024
    rate = {dtype: _rate(device, dtype, side) for dtype in (torch.bfloat16, torch.float32)}
    return Limits(bandwidth=_bandwidth(device, size), rate=rate)


def _bandwidth(device: str, size: int) -> float:
    """The best of a sum and of products of one vector with a matrix, over the same written memory."""
    written = torch.randn(size // 4, device=device)
    columns = 2**12
    runs: list[Callable[[], object]] = [lambda: written.sum()]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = written.to(dtype).view(-1, columns)
        vector = torch.ones(1, columns, device=device, dtype=dtype)
        runs.append(lambda m=matrix, v=vector: F.linear(v, m))
    sizes = (size, size, size // 2)
    return max(nbytes / _best(run) for run, nbytes in zip(runs, sizes, strict=True))


def _rate(device: str, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: F.linear(left, right))


def _best(run: Callable[[], object]) -> float:
    """The shortest of a few calls [s]."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return min(timer.timeit(1).median for _ in range(8))


# --- the forms -----------------------------------------------------------------------------------------


class Chain(nn.Module):
    """`x + ffn(norm(x))`, layer by layer; x: [tokens, hidden]."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(layer.post_attention_layernorm for layer in layers)
        self.ffns = nn.ModuleList(layer.mlp for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x))
        return x

    def parallel(self, x: Tensor) -> Tensor:
        """The form that fusing is exact for, module by module."""
        total = x.float()
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            total = total + ffn(norm(x)).float()
        return total


class Concatenated(nn.Module):
    """The wide FFN without anything kept: gains folded and weights concatenated at each call."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.norms, self.ffns = chain.norms, chain.ffns

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.norms[0]
        pairs: list[Any] = list(zip(self.norms, self.ffns, strict=True))
        gate = torch.cat([ffn.gate_proj.weight * norm.weight for norm, ffn in pairs])
        up = torch.cat([ffn.up_proj.weight * norm.weight for norm, ffn in pairs])
        down = torch.cat([ffn.down_proj.weight for _, ffn in pairs], dim=1)
        normed = F.rms_norm(x, x.shape[-1:], None, first.variance_epsilon)
        return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def decoder(hidden: int, widths: Sequence[int], dtype: torch.dtype, device: str) -> Any:
    """A decoder whose attention and vocabulary are as small as they can be; random weights, gains near 1."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": max(widths), "num_hidden_layers": len(widths)}
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    tokens: dict[str, Any] = {"vocab_size": 32, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(**sizes, **heads, **tokens)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        for layer, width in zip(model.model.layers, widths, strict=True):
            layer.mlp = LlamaMLP(LlamaConfig(**{**config.to_dict(), "intermediate_size": width}))
    return with_random_weights(model.to(dtype), device)


def with_random_weights(model: Any, device: str) -> Any:
    """Give a model on the meta device memory and values. One block of random numbers is repeated: values need not
    differ, but must not be zero, which some hardware computes faster."""
    rotary = type(model.model.rotary_emb)(model.config).to(device)
    model.to_empty(device=device)
    model.model.rotary_emb = rotary
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        for value in model.parameters():
            filled = block.repeat(-(-value.numel() // len(block)))[: value.numel()].view(value.shape)
            value.copy_(filled * value.shape[-1] ** -0.5 if value.dim() > 1 else 1 + 0.1 * filled)
    return model.eval()


def forms(cell: Cell, device: str, modes: Sequence[str]) -> tuple[dict[str, Run], Chain]:
    """Every form by name, not yet compiled, and the modules."""
    model = decoder(cell.shape.hidden, cell.shape.members(cell.length), cell.dtype, device)
    chain = Chain(model.model.layers)
    wide = copy.deepcopy(model)
    plan = {"dropped_attention": range(1, cell.length), "groups": [range(cell.length)]}
    fxfusion.fuse(wide, plan, check=False)
    surgery = Chain(wide.model.layers)
    if len(surgery.ffns) != 1:
        raise RuntimeError(f"{cell.place}: fuse left {len(surgery.ffns)} FFNs of {cell.length}")
    found: dict[str, Run] = {"eager": chain}
    for mode in ("default", *modes):
        suffix = "" if mode == "default" else f", {mode}"
        found[f"unfused{suffix}"] = compiled(chain, mode)
        found[f"fused{suffix}"] = compiled(chain, mode, fused=True)
        found[f"surgery{suffix}"] = compiled(surgery, mode)
    found["concatenated by call"] = compiled(Concatenated(chain), "default")
    found[control_of(modes)] = compiled(chain, (modes or ("default",))[-1])
    return found, chain


def control_of(modes: Sequence[str]) -> str:
    """Name of the second copy of the unfused chain, in the last mode."""
    return "unfused again" if not modes else f"unfused again, {modes[-1]}"


def compiled(module: Callable[..., Any], mode: str, *, fused: bool = False, plan: Any = None) -> Callable[..., Any]:
    """Compiled code of its own: a fresh code object, so that no candidate looks through the others' guards."""

    def call(x: Tensor) -> Any:
        return module(x)

    code = call.__code__.replace(co_name=f"candidate_{next(_serial)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    if fused:
        options = {"mode": mode, "strict": True, "plan": plan}
        return torch.compile(own, backend=fxfusion.ffn_fusion, options=options, dynamic=False, fullgraph=True)
    return torch.compile(own, mode=mode, dynamic=False, fullgraph=True)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_close(what: str, found: Tensor, wanted: Tensor, stream: Tensor | None = None) -> float:
    """How far a result is off, relative to what was added to the stream. Raises `RuntimeError` where it is something
    else: its speed would mean nothing."""
    limit = 0.05 if found.dtype == torch.bfloat16 else 1e-3
    size = wanted.float() if stream is None else wanted.float() - stream.float()
    error = float((found.float() - wanted.float()).norm() / size.norm())
    if not error <= limit:
        raise RuntimeError(f"{what} is off by {error:.2g}, allowed {limit}")
    return error


def first_calls(runs: dict[str, Run], chain: Chain, x: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the first call, and how far each result is from what it should be, relative to the branch."""
    sequential, parallel = chain(x), chain.parallel(x)
    seconds, errors = {}, {}
    for name, run in runs.items():
        wanted = sequential if name.startswith(("eager", "unfused")) else parallel
        start = time.perf_counter()
        output = run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        errors[name] = check_close(name, output, wanted, x)
    return seconds, errors


# --- the benchmark -------------------------------------------------------------------------------------


def measure_cell(
    cell: Cell, device: str, limits: Limits, modes: Sequence[str] = (), *, rounds: int, threads: int
) -> Measurement:
    """All forms of one cell, in turn. Ratios: of every form over the fused one of the same mode, and the control."""
    torch._dynamo.reset()
    runs, chain = forms(cell, device, modes)
    x = torch.randn(cell.tokens, cell.shape.hidden, device=device, dtype=cell.dtype)
    with torch.no_grad():
        seconds, errors = first_calls(runs, chain, x)
        calls = {name: partial(run, x) for name, run in runs.items()}
        samples = measure(calls, rounds=rounds, threads=threads, sample_seconds=0.01 if x.is_cuda else 0.02)
    found = Measurement.of(cell.place, samples, pairs(list(samples), control_of(modes)))
    limit = limits.seconds(cell.parameters, cell.tokens, cell.dtype)
    facts: dict[str, Scalar] = {"bytes": cell.parameters * cell.dtype.itemsize, "limit_seconds": limit}
    facts |= {f"first call, {name}": round(value, 3) for name, value in seconds.items()}
    facts |= {f"error, {name}": float(f"{value:.3g}") for name, value in errors.items()}
    facts |= shares(found, limit)
    return found.model_copy(update={"facts": facts})


def pairs(names: Sequence[str], control: str) -> list[tuple[str, str]]:
    """Each form against the fused one of its mode; the unfused one against its control."""
    fused = {name.partition(", ")[2]: name for name in names if name.startswith("fused")}
    modes = {name: name.partition(", ")[2] for name in names}
    against = [(name, fused[modes[name]]) for name in names if not name.startswith(("fused", control))]
    return [*against, (control.replace("unfused again", "unfused"), control)]


def shares(found: Measurement, limit: float) -> Mapping[str, Scalar]:
    """How much of the limit each form reaches: 1 is as fast as the machine allows."""
    return {f"share of limit, {name}": round(limit / one.value, 4) for name, one in found.medians.items()}


# Members, tokens, type; most important first. Weights of 200 to 800 MB: no cache holds them.
ON_THE_CPU = (
    (8, 1, torch.bfloat16),
    (8, 16, torch.bfloat16),
    (4, 1, torch.float32),
    (2, 1, torch.bfloat16),
    (15, 1, torch.bfloat16),
    (4, 64, torch.bfloat16),
)


def main() -> None:
    chosen = arguments(__doc__, seconds=150.0, rounds=12).parse_args()
    torch.set_num_threads(1)
    with Session("grid", seconds=chosen.seconds, fresh=not chosen.go_on) as session:
        limits = measure_limits("cpu")
        session.results["limits"] = limits.to_dict()
        session.predictions = PREDICTIONS
        for length, tokens, dtype in ON_THE_CPU:
            cell = Cell(SHAPES["1B"], length, tokens, dtype)
            run = partial(measure_cell, cell, "cpu", limits, rounds=chosen.rounds, threads=1)
            session.do(cell.place, run, needs=NEEDS)
    print(ratio_table(session.measurements, columns(session.measurements)))


def columns(found: Sequence[Measurement]) -> list[tuple[str, str]]:
    """Ratios and their headings, for the table."""
    names = dict.fromkeys(name for one in found for name in one.ratios)
    return [(name, "A/A" if "again" in name else f"{name.partition('/')[0]} over fused") for name in names]


if __name__ == "__main__":
    main()
