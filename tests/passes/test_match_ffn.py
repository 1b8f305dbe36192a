"""What counts as a feed-forward branch, in how many spellings, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.errors import RefusalCode
from tests.helpers import (
    WIDTH,
    assert_fuses,
    assert_not_fused,
    customs,
    match,
    refused,
    tokens,
)

Norm = Callable[[Any, Tensor], Tensor]
Branch = Callable[[Any, Tensor], Tensor]


def var_mean_norm(m: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * m.g + m.b


def two_step_norm(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * m.g + m.b


NORMS: dict[str, Norm] = {
    "rms, rsqrt, gain last": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.g,
    "rms, gain first": lambda m, x: m.g * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
    "rms, divided by sqrt": lambda m, x: m.g * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
    "rms, sum over a literal": lambda m, x: x / (x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6) ** 0.5 * m.g,
    "rms, power of -0.5": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5) * m.g,
    "rms, without keepdim": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).unsqueeze(-1) * m.g,
    "rms, axis as a tuple": lambda m, x: x * torch.rsqrt(x.pow(2).mean((-1,), keepdim=True) + 1e-6) * m.g,
    "rms, positive axis": lambda m, x: x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + 1e-6) * m.g,
    "rms, vector norm": lambda m, x: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * 8**-0.5 + 1e-6) * m.g,
    "rms, by size": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.size(-1) + 1e-6) * m.g,
    "rms, (1 + w)": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.g),
    "rms, functional": lambda m, x: F.rms_norm(x, (8,), m.g, 1e-6),
    "rms, functional (1 + w)": lambda m, x: F.rms_norm(x, (8,), m.g + 1, 1e-6),
    "rms, gain and shift": lambda m, x: F.rms_norm(x, (8,), m.g, 1e-6) + m.b,
    "rms, no weight": lambda m, x: F.rms_norm(x, (8,), None, 1e-6),
    "rms, two gains": lambda m, x: F.rms_norm(x, (8,), m.g, 1e-6) * m.s,
    "rms, gain of one number": lambda m, x: F.rms_norm(x, (8,), None, 1e-6) * m.one,
    "layer norm": lambda m, x: F.layer_norm(x, (8,), m.g, m.b, 1e-5),
    "layer norm, no bias": lambda m, x: F.layer_norm(x, (8,), m.g, None, 1e-5),
    "layer norm, no weight": lambda m, x: F.layer_norm(x, (8,), None, None, 1e-5),
    "layer norm, only bias": lambda m, x: F.layer_norm(x, (8,), None, m.b, 1e-5),
    "layer norm, by hand": two_step_norm,
    "layer norm, var": lambda m, x: (
        (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * m.g
    ),
    "layer norm, var_mean": var_mean_norm,
    "layer norm, (1 + w)": lambda m, x: F.layer_norm(x, (8,), m.g + 1.0, m.b, 1e-5),
    "l2": lambda m, x: F.normalize(x, dim=-1) * m.g,
    "l2, scaled": lambda m, x: F.normalize(x, dim=-1) * (m.g * 8**0.5),
    "max": lambda m, x: x / x.abs().amax(-1, keepdim=True) * m.g,
    "none": lambda m, x: x,
    "gain only": lambda m, x: x * m.g,
}


def _gated(m: Any, n: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(n, m.w1)) * F.linear(n, m.w3), m.w2)


def _plain(m: Any, n: Tensor, act: Callable[[Any, Tensor], Tensor]) -> Tensor:
    return F.linear(act(m, F.linear(n, m.w1, m.b1)), m.w2, m.b2)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_every_spelling_of_a_norm_fuses(norm: Norm) -> None:
    assert_fuses(customs(lambda m, x: _gated(m, norm(m, x))), tokens())


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("name", ["rms, without keepdim", "layer norm", "layer norm, by hand", "l2"])
def test_norms_of_streams_of_other_ranks_fuse(name: str, shape: tuple[int, ...]) -> None:
    model = customs(lambda m, x: _gated(m, NORMS[name](m, x)))
    assert_fuses(model, tokens(1, math.prod(shape[:-1])).reshape(shape))


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("name", ["rms, without keepdim", "rms, (1 + w)", "layer norm", "layer norm, by hand"])
def test_other_captures_spell_it_differently_and_fuse(name: str, how: Any) -> None:
    assert_fuses(customs(lambda m, x: _gated(m, NORMS[name](m, x))), tokens(), how=how)


@pytest.mark.parametrize("name", ["rms, functional", "layer norm", "l2"])
def test_norms_match_in_inference_mode_too(name: str) -> None:
    """There torch dispatches whole operations, `layer_norm` instead of its parts."""
    model, x = customs(lambda m, x: _gated(m, NORMS[name](m, x))), tokens()
    with torch.inference_mode():
        assert len(match(model, x).ffns) == 2


def xielu(m: Any, h: Tensor) -> Tensor:
    """A piecewise activation with two learned numbers."""
    positive, negative = F.softplus(m.one), 0.5 + F.softplus(m.two)
    low = (torch.expm1(torch.clamp(h, max=-1e-6)) - h) * negative + 0.5 * h
    return torch.where(h > 0, positive * h * h + 0.5 * h, low)


def tanh_gelu(m: Any, h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


ACTIVATIONS: dict[str, Branch] = {
    "silu": lambda m, h: F.silu(h),
    "silu by hand": lambda m, h: h * torch.sigmoid(h),
    "gelu": lambda m, h: F.gelu(h),
    "gelu tanh": lambda m, h: F.gelu(h, approximate="tanh"),
    "gelu erf by hand": lambda m, h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))),
    "gelu tanh by hand": tanh_gelu,
    "quick gelu": lambda m, h: h * torch.sigmoid(1.702 * h),
    "relu": lambda m, h: F.relu(h),
    "relu in place": lambda m, h: F.relu(h, inplace=True),
    "relu_": lambda m, h: h.relu_(),
    "relu squared": lambda m, h: torch.square(F.relu(h)),
    "relu squared by power": lambda m, h: F.relu(h).pow(2),
    "leaky relu": lambda m, h: F.leaky_relu(h, 0.1),
    "hardswish": lambda m, h: F.hardswish(h),
    "mish": lambda m, h: F.mish(h),
    "clamped": lambda m, h: h.clamp(-1.0, 1.0),
    "where": lambda m, h: torch.where(h > 0, h, 0.1 * h),
    "xielu": xielu,
    "learned slope per channel": lambda m, h: F.relu(h) * m.a + h,
    "prelu": lambda m, h: F.prelu(h, m.one.reshape(1)),
    "prelu per number": lambda m, h: torch.where(h > 0, h, m.one * h),
    "snake": lambda m, h: h + torch.sin(m.a * h).pow(2) / m.a,
    "none": lambda m, h: h,
    "views": lambda m, h: F.silu(h.reshape(-1, 12)).view(2, 5, 12),
    "bits read as integers": lambda m, h: (F.silu(h).view(torch.int64) ^ 1).view(torch.float64),
    "zeros of its own": lambda m, h: torch.maximum(h, torch.zeros_like(h)),
    "log sigmoid": lambda m, h: F.logsigmoid(h) * h,
    "in float32 and back": lambda m, h: F.silu(h.to(torch.float32).to(torch.float64)),
}


@pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_any_pointwise_activation_fuses(act: Branch) -> None:
    assert_fuses(customs(lambda m, x: _plain(m, F.rms_norm(x, (8,), m.g), act)), tokens())


def test_members_may_share_the_vector_of_their_activation() -> None:
    shared = torch.nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))

    def branch(m: Any, x: Tensor) -> Tensor:
        return _plain(m, x, lambda m, h: F.silu(h) * m.a)

    model = customs(branch)
    for layer in model.layers:
        layer.a = shared
    assert_fuses(model, tokens())


PACKED: dict[str, Branch] = {
    "chunk": lambda m, h: h.chunk(2, -1),
    "chunk by keyword": lambda m, h: torch.chunk(h, chunks=2, dim=-1),
    "split": lambda m, h: h.split(12, -1),
    "split by sizes": lambda m, h: torch.split(h, [12, 12], dim=-1),
    "split on a positive axis": lambda m, h: torch.split(h, 12, 2),
    "tensor_split": lambda m, h: torch.tensor_split(h, 2, -1),
    "slices": lambda m, h: (h[..., :12], h[..., 12:]),
    "slices with all axes": lambda m, h: (h[:, :, :12], h[:, :, 12:]),
    "slices, negative": lambda m, h: (h[..., :-12], h[..., -12:]),
    "interleaved": lambda m, h: (h[..., ::2], h[..., 1::2]),
    "narrow": lambda m, h: (h.narrow(-1, 0, 12), torch.narrow(h, -1, 12, 12)),
    "behind a view": lambda m, h: h.view(2, 5, 24).chunk(2, -1),
    "second half first": lambda m, h: (h[..., 12:], h[..., :12]),
}


@pytest.mark.parametrize("cut", PACKED.values(), ids=PACKED)
def test_packed_gate_and_up_fuse(cut: Branch) -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        gate, up = cut(m, F.linear(F.rms_norm(x, (8,), m.g), m.wide))
        return F.linear(F.gelu(gate) * up, m.w2)

    assert_fuses(customs(branch), tokens())


def test_a_cut_by_a_number_that_is_computed_is_refused() -> None:
    """Only `symbolic_trace` leaves it to be computed; elsewhere it is a plain number."""

    def branch(m: Any, x: Tensor) -> Tensor:
        h = F.linear(x, m.wide)
        gate, up = torch.split(h, h.size(-1) // 2, -1)
        return F.linear(F.silu(gate) * up, m.w2)

    assert_not_fused(customs(branch), [tokens()], RefusalCode.STRUCTURE, "the middle reads 24 channels")
    assert_fuses(customs(branch), tokens(), how="export")


def test_one_channel_that_a_scale_spreads_over_the_stream_is_refused() -> None:
    def branch(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, m.w1)), m.w2[:1]) * m.g

    assert_not_fused(customs(branch), [tokens()], RefusalCode.BROADCAST, "the branch is 1 wide")


def test_members_that_take_the_halves_in_another_order_do_not_fit() -> None:
    def branch(first: int) -> Branch:
        def run(m: Any, x: Tensor) -> Tensor:
            halves = F.linear(x, m.wide).chunk(2, -1)
            return F.linear(F.silu(halves[first]) * halves[1 - first], m.w2)

        return run

    assert_not_fused(customs(branch(0), branch(1)), [tokens()], RefusalCode.DIFFERENT_LITERAL)


# name -> (branch, code, words). Every one of them must stay as it is, and say why.
NOT_A_FEED_FORWARD = refused(
    LINEAR_COUNT={
        "one linear layer": (lambda m, x: F.linear(F.silu(x), m.square), "one linear layer"),
        "three linear layers in a row": (
            lambda m, x: F.linear(F.silu(F.linear(F.silu(F.linear(x, m.square)), m.w1)), m.w2),
            "more than two linear layers",
        ),
    },
    TOKEN_MIXING={
        "softmax over parts of the channels": (
            lambda m, x: F.linear(F.linear(x, m.w1).unflatten(-1, (2, 6)).softmax(-1).flatten(-2), m.w2),
            "cuts or joins the channel axis",
        ),
        "channels turned round": (lambda m, x: _plain(m, x, lambda m, h: h + h.roll(1, -1)), "roll"),
        "channels in groups": (
            lambda m, x: _plain(m, x, lambda m, h: F.silu(h.view(2, 5, 3, 4)).view(2, 5, 12)),
            "cuts or joins the channel axis",
        ),
    },
    NOT_POINTWISE={
        "channels in another order": (lambda m, x: _plain(m, x, lambda m, h: h[..., [*range(1, 12), 0]]), "index"),
        "a new tensor in the middle": (lambda m, x: _plain(m, x, lambda m, h: h * h.new_ones(2, 5, 12)), ""),
    },
    STRUCTURE={
        "half of the activation": (
            lambda m, x: F.linear(F.silu(F.linear(x, m.wide))[..., :12], m.w2),
            "the middle reads 24 channels",
        ),
        "the input gates the middle": (
            lambda m, x: F.linear(F.linear(x, m.square) * x.sigmoid(), m.square),
            "which no projection made",
        ),
        "two norms": (
            lambda m, x: F.linear(F.linear(x * m.g, m.w1) * F.linear(x * m.s, m.w3), m.w2),
            "read different values",
        ),
        "gate after the down projection": (
            lambda m, x: _gated(m, x) * torch.sigmoid(F.linear(x, m.square)),
            "stands between",
        ),
        "two branches added": (lambda m, x: _gated(m, x) + F.linear(x, m.square), "stands between"),
    },
)


NAME_SIZES = ("layer norm over tokens too", "one token for all", "a token picked by number")
# Formulas that let one token see another, or look as if a norm's gain could be folded when it cannot.
LOOK_ALIKES = refused(
    TOKEN_MIXING={
        "mean over tokens": (lambda m, x: _gated(m, x - x.mean(1, keepdim=True)), "mean"),
        "mean over all": (lambda m, x: _gated(m, x - x.mean()), "mean"),
        "mean over two axes": (lambda m, x: _gated(m, x - x.mean((-2, -1), keepdim=True)), "mean"),
        "max over tokens": (lambda m, x: _gated(m, x / x.amax(1, keepdim=True)), "amax"),
        "norm over all": (lambda m, x: _gated(m, x / x.norm()), "norm"),
        "softmax over tokens": (lambda m, x: _gated(m, x.softmax(1)), "softmax"),
        "cumulative sum": (lambda m, x: _gated(m, x.cumsum(1)), "cumsum"),
        "first token": (lambda m, x: _gated(m, x - x[:, :1]), "slice"),
        "shifted tokens": (lambda m, x: _gated(m, torch.cat([x[:, :1], x[:, :-1]], 1)), "slice"),
        "rolled tokens": (lambda m, x: _gated(m, x.roll(1, 1)), "roll"),
        "flipped tokens": (lambda m, x: _gated(m, x.flip(1)), "flip"),
        "padded tokens": (lambda m, x: _gated(m, F.pad(x, (0, 0, 1, -1))), "pad"),
        "sorted tokens": (lambda m, x: _gated(m, x.sort(1)[0]), "sort"),
        "one token for all": (lambda m, x: _gated(m, x[:, :1].expand(2, 5, 8)), "slice"),
        "swapped axes": (
            lambda m, x: F.linear(F.silu(F.linear(x.transpose(0, 1), m.w1)), m.w2).transpose(0, 1),
            "transpose",
        ),
        "scores of tokens": (lambda m, x: _gated(m, (x @ x.mT).softmax(-1) @ x), ""),
        "mixing through einsum": (
            lambda m, x: F.linear(torch.einsum("bsh,st->bth", x, m.square[: x.shape[1], : x.shape[1]]), m.square),
            "",
        ),
    },
    UNKNOWN_OP={
        "layer norm over tokens too": (lambda m, x: _gated(m, F.layer_norm(x, (5, 8))), "layer_norm"),
        "a token picked by number": (lambda m, x: _gated(m, x[:, [0, 0, 1, 2, 3]]), "index"),
        "batch norm": (lambda m, x: _gated(m, F.batch_norm(x, None, None, training=True)), "batch_norm"),
    },
    MODE_CHANGE={"detached input": (lambda m, x: _gated(m, x.detach()), "detach")},
    RANDOM={"random noise": (lambda m, x: _gated(m, x + torch.randn_like(x)), "randn_like")},
    NORM_UNPROVED={
        "gain that is clamped after": (lambda m, x: _gated(m, (F.rms_norm(x, (8,)) * m.g).clamp(-50, 50)), "gain"),
        "gain before the norm": (lambda m, x: _gated(m, F.rms_norm(x * m.g, (8,))), "gain"),
        "gain as a power": (lambda m, x: _gated(m, x.abs() ** m.g), "gain"),
        "learned epsilon": (
            lambda m, x: _gated(m, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.one.abs())),
            "gain",
        ),
        "gain behind an integer cast": (
            lambda m, x: _gated(m, (F.rms_norm(x, (8,)) * m.g).to(torch.int32).to(torch.float64)),
            "gain",
        ),
        "gain rounded": (lambda m, x: _gated(m, (F.rms_norm(x, (8,)) * m.g).round()), "gain"),
    },
)


@pytest.mark.parametrize(("branch", "code", "words"), [*NOT_A_FEED_FORWARD, *LOOK_ALIKES])
def test_what_is_no_feed_forward_is_refused(branch: Branch, code: RefusalCode, words: str) -> None:
    assert_not_fused(customs(branch), [tokens()], code, words)


@pytest.mark.parametrize(("branch", "code", "words"), [case for case in LOOK_ALIKES if case.id not in NAME_SIZES])
def test_look_alikes_are_refused_where_all_sizes_coincide(branch: Branch, code: RefusalCode, words: str) -> None:
    """Batch = sequence = hidden = width: no shape can tell the axes apart."""
    assert_not_fused(customs(branch, width=8), [tokens(8, 8)], code)


def test_a_learned_number_of_another_dtype_is_not_made_a_vector() -> None:
    """float32 numbers leave a bfloat16 middle bfloat16, a float32 vector would not."""
    model = customs(lambda m, x: _plain(m, x, lambda m, h: F.silu(m.one * h)))
    model.to(torch.bfloat16)
    for layer in model.layers:
        layer.one.data = layer.one.data.float()
    assert_not_fused(model, [tokens(dtype=torch.bfloat16)], RefusalCode.DIFFERENT_DTYPE, "number in a middle")
