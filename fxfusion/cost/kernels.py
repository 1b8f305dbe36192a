"""The kernels of a sublayer on one of `tp` devices: bytes that move, FLOPs, tiles.

    attention   norm, qkv, rotate and write cache, attention, out, (all-reduce)
    FFN         norm, gate and up, activation, down, (all-reduce)
    at the end  norm, lm head, (gather of the logits)

Weights are cut by columns (qkv, gate, up, lm head) and rows (out, down); a fused FFN as any other, so that each
device holds 1/tp of every member. Embeddings are whole on each device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fxfusion.cost.hardware import PRECISIONS
from fxfusion.cost.sublayers import Attention, Ffn, Step, Sublayer
from fxfusion.errors import OptionError

Phase = Literal["decode", "prefill"]
Launch = Literal["cuda-graph", "eager", "megakernel"]
AllReduce = Literal["plain", "fused-norm"]
_BITS = {"fp4": 4, "fp8": 8, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is run. `precision`: of the weights of all sublayers. `batch`: sequences at once; `context`: tokens of
    each, already in the cache (decode) or to be read (prefill).

    Activations, embeddings and the lm head stay in 16 bits, in 32 with fp32; so does the cache, unless `kv_precision`
    says otherwise. `tp`: devices that share every matrix.

    What it runs on: `launch`, how its kernels are started; `all_reduce`: with `fused-norm` the residual's addition and
    the norm behind it are part of its kernel (vLLM at O2, TensorRT-LLM).
    """

    precision: str = "bf16"
    batch: int = 1
    context: int = 1024
    phase: Phase = "decode"
    tp: int = 1
    kv_precision: str | None = None
    launch: Launch = "cuda-graph"
    all_reduce: AllReduce = "plain"

    def __post_init__(self) -> None:
        for name in ("precision", "kv_precision"):
            value = getattr(self, name)
            if value not in (*PRECISIONS, *((None,) if name == "kv_precision" else ())):
                raise OptionError(f"{name}: expected one of {', '.join(PRECISIONS)}, got {value!r}")
        named: dict[str, Any] = {"phase": Phase, "launch": Launch, "all_reduce": AllReduce}
        for name, kinds in named.items():
            if getattr(self, name) not in get_args(kinds):
                raise OptionError(f"{name}: expected {' or '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        for name, least in (("batch", 1), ("tp", 1), ("context", int(self.phase == "prefill"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name}: expected a whole number from {least} on, got {value!r}")

    @property
    def tokens(self) -> int:
        """Tokens that one step computes."""
        return self.batch * (self.context if self.phase == "prefill" else 1)

    @property
    def plain(self) -> str:
        """What activations are kept in."""
        return "fp32" if self.precision == "fp32" else "fp16" if self.precision == "fp16" else "bf16"

    @property
    def weight_size(self) -> float:
        """Bytes of one weight."""
        return _BITS[self.precision] / 8

    @property
    def size(self) -> float:
        """Bytes of one activation."""
        return _BITS[self.plain] / 8

    @property
    def kv_size(self) -> float:
        return _BITS[self.kv_precision or self.plain] / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel. `bytes`: read and written. `precision`: of its arithmetic.

    `tiles`: pieces of a GEMM's output, of which each takes `tile_flops`, full or not; None where it is no GEMM.
    """

    name: str
    bytes: float
    flops: float = 0.0
    tiles: int | None = None
    tile_flops: float = 0.0
    precision: str = "bf16"


_TILE = 128  # rows and columns of a GEMM's output that one processor computes at a time
_LEAST_ROWS = 16


def gemm(
    name: str, inputs: int, outputs: int, work: Workload, *, rows: int | None = None, plain: bool = False
) -> Kernel:
    """`[rows, inputs] x [inputs, outputs]`, the weights read once. `plain`: weights in the activations' precision."""
    rows = work.tokens if rows is None else rows
    tall = min(_TILE, max(_LEAST_ROWS, 1 << (rows - 1).bit_length()))
    weights = inputs * outputs * (work.size if plain else work.weight_size)
    return Kernel(
        name=name,
        bytes=weights + rows * (inputs + outputs) * work.size,
        flops=2.0 * rows * inputs * outputs,
        tiles=math.ceil(rows / tall) * math.ceil(outputs / _TILE),
        tile_flops=2.0 * tall * _TILE * inputs,
        precision=work.plain if plain else work.precision,
    )


def kernels_of(part: Sublayer, hidden: int, work: Workload) -> Iterator[Kernel]:
    """The kernels of one sublayer on one device. Raises `OptionError` where `tp` does not divide it."""
    stream = work.tokens * hidden * work.size
    yield Kernel(name="norm", bytes=3 * stream)  # the branch before is added to the stream on the way
    if isinstance(part, Ffn):
        width = _share(part.width, work.tp, f"the FFN of layer {_shown(part)} has {part.width} channels")
        matrices = 2 if part.gated else 1
        yield gemm("gate and up" if part.gated else "up", hidden, matrices * width, work)
        yield Kernel(name="activation", bytes=work.tokens * (matrices + 1) * width * work.size)
        yield gemm("down", width, hidden, work)
        return
    sizes = [(kind, *local_channels(kind, work.tp)) for kind in part.kinds]
    queries, keys = sum(own for _, own, _ in sizes), sum(own for _, _, own in sizes)
    yield gemm("qkv", hidden, queries + 2 * keys, work)
    for kind, own_queries, own_keys in sizes:
        made = own_queries + 2 * own_keys
        yield Kernel(name="rotate and write cache", bytes=2 * work.tokens * made * work.size)
        yield _attention(kind, own_queries, own_keys, work)
    yield gemm("out", queries, hidden, work)


def _attention(part: Attention, queries: int, keys: int, work: Workload) -> Kernel:
    reach = work.context if part.window is None else min(part.window, work.context)
    if work.phase == "decode":
        seen = work.batch * (reach + 1)  # positions that all queries of the batch look at, and read from the cache
        cache = seen * 2 * keys * work.kv_size
    else:  # causal: a query sees those before it, and at most `reach`
        seen = work.batch * (reach * (reach + 1) // 2 + (work.context - reach) * reach)
        cache = work.tokens * 2 * keys * work.size
    return Kernel(
        name="attention",
        bytes=cache + 2 * work.tokens * queries * work.size,
        flops=4.0 * seen * queries,
        precision=work.plain,
    )


def head_kernels(step: Step, work: Workload) -> Iterator[Kernel]:
    """The last norm and the lm head, for the last token of each sequence."""
    yield Kernel(name="norm", bytes=3 * work.batch * step.hidden * work.size)
    if step.vocabulary is not None:
        share = math.ceil(step.vocabulary / work.tp)
        yield gemm("lm head", step.hidden, share, work, rows=work.batch, plain=True)


def local_heads(part: Attention, tp: int) -> tuple[int, int]:
    """Query and key-value heads on one device; more devices than key-value heads hold copies of them."""
    shown = f"the attention of layer {_shown(part)} has"
    heads = _share(part.heads, tp, f"{shown} {part.heads} heads")
    if tp <= part.kv_heads:
        return heads, _share(part.kv_heads, tp, f"{shown} {part.kv_heads} key-value heads")
    if tp % part.kv_heads:
        raise OptionError(f"{shown} {part.kv_heads} key-value heads, and tp {tp} is no multiple of them")
    return heads, 1


def local_channels(part: Attention, tp: int) -> tuple[int, int]:
    """Channels of the queries, and of the keys (as many as of the values), of one kind on one device."""
    heads, kv_heads = local_heads(part, tp)
    return heads * part.head_dim, kv_heads * part.head_dim


def _share(whole: int, parts: int, what: str) -> int:
    if whole % parts:
        raise OptionError(f"{what}, which tp {parts} does not divide")
    return whole // parts


def _shown(part: Sublayer) -> str:
    return ", ".join(map(str, part.layers)) or "?"
