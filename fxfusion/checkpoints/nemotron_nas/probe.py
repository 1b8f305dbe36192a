"""Tests of single modules on small random inputs: is this norm an RMSNorm, is this FFN a gated SiLU one?

Parameters are replaced by random ones for the call, small where the module allows it, so this works on the meta device
and costs nothing on a large model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.checkpoints.nemotron_nas.parts import ATTENTION_NORM, FFN_NORM, DecoderParts, LayerParts
from fxfusion.errors import CheckpointError

_HIDDEN, _WIDTH, _TOKENS = 16, 8, 3
_CLOSE = 1e-4  # other norms and activations are off by 1e-2 and more
_SMALL = 2e-3  # inputs of a size at which eps matters


def common_eps(model: nn.Module, parts: DecoderParts) -> float:
    """The eps of all norms. Raises `CheckpointError` where one is no RMSNorm, or they differ in eps."""
    names = [parts.norm.removesuffix(".weight")]
    names += [
        layer.modules[norm] for layer in parts.layers for norm in (ATTENTION_NORM, FFN_NORM) if norm in layer.modules
    ]
    found: dict[float, str] = {}
    for name in names:
        found.setdefault(_eps_of(model.get_submodule(name), name, parts.state[f"{name}.weight"].shape[0]), name)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise CheckpointError(
            f"the nemotron-nas layout has one eps for all norms: {first} has {one:g}, {second} has {other:g}"
        )
    return next(iter(found))


def check_ffn(model: nn.Module, layer: LayerParts) -> None:
    """Raises `CheckpointError` unless the layer's FFN is down(silu(gate(x)) * up(x)), biases included."""
    name = layer.modules["ffn"]
    random = torch.Generator().manual_seed(0)
    module, own = model.get_submodule(name), {}
    for role in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"):
        for leaf in ("weight", "bias"):
            if f"{role}.{leaf}" not in dict(module.named_parameters()):
                continue
            outputs = {"down_proj": _HIDDEN, "gate_up_proj": 2 * _WIDTH}.get(role, _WIDTH)
            inputs = _WIDTH if role == "down_proj" else _HIDDEN
            own[f"{role}.{leaf}"] = torch.randn([outputs, inputs][: 2 if leaf == "weight" else 1], generator=random)
    x = torch.randn(_TOKENS, _HIDDEN, generator=random)
    expected = _gated(own, x)
    got = _call(module, name, own, x)
    if got.shape != expected.shape or not _is_close(got, expected):
        raise CheckpointError(
            f"the nemotron-nas layout's FFN is down(silu(gate(x)) * up(x)); {name} computes something else"
        )


def _gated(own: dict[str, Tensor], x: Tensor) -> Tensor:
    def linear(role: str, value: Tensor) -> Tensor:
        return F.linear(value, own[f"{role}.weight"], own.get(f"{role}.bias"))

    packed = "gate_up_proj.weight" in own
    gate, up = linear("gate_up_proj", x).chunk(2, -1) if packed else (linear("gate_proj", x), linear("up_proj", x))
    return linear("down_proj", F.silu(gate) * up)


def _eps_of(norm: nn.Module, name: str, hidden: int) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        raise CheckpointError(
            f"the nemotron-nas layout's norms are RMSNorms with an eps; {name} ({type(norm).__name__}) says none"
        )
    random = torch.Generator().manual_seed(0)
    gain = torch.randn(hidden, generator=random)
    x = torch.randn(_TOKENS, hidden, generator=random) * _SMALL
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain
    if not _is_close(_call(norm, name, {"weight": gain}, x), expected):
        raise CheckpointError(
            f"the nemotron-nas layout's norms are RMSNorms; {name} ({type(norm).__name__}) computes something else"
        )
    return eps


@torch.no_grad()
def _call(module: Any, name: str, own: dict[str, Tensor], x: Tensor) -> Tensor:
    try:
        found = torch.func.functional_call(module, own, (x,), strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be tried on a random input: {error}") from error
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{name} returns a {type(found).__name__}, where the layout's modules return a tensor")
    return found


def _is_close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= _CLOSE * expected.norm())
