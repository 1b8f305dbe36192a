"""What a config says, or a module computes, that the layout cannot: windows, multipliers, other norms and FFNs.

Modules are tried on small random inputs, with random parameters for the call, small where the module allows it: this
works on the meta device and costs nothing on a large model. Together with the tensors (`parts.py`) it decides without
weights. With weights, the logits are compared as well (`proof.py`).
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.checkpoints.nemotron_nas.parts import ATTENTION_NORM, FFN_NORM, DecoderParts, LayerParts
from fxfusion.errors import CheckpointError

# Factors on embeddings, residual branches, attention and logits, in the words of many configs.
_FACTOR = re.compile(
    r".*multiplier|.*(logits?|attention|attn|embedding|residual|depth|emb)_scal(e|ing)|.*softcap\w*|scale_\w+"
)
_NEUTRAL = (None, False, 1, 1.0, "")
_HIDDEN, _WIDTH, _TOKENS = 16, 8, 3
_CLOSE = 1e-4  # other norms and activations are off by 1e-2 and more
_SMALL = 2e-3  # inputs of a size at which eps matters


def check_facts(model: nn.Module, config: Any, parts: DecoderParts) -> None:
    """Raises `CheckpointError` that names the setting for which the layout has no word."""
    _check_window(model, config, parts)
    for name, value in vars(config).items():
        if _FACTOR.fullmatch(name) and isinstance(value, (int, float)) and value not in _NEUTRAL:
            raise CheckpointError(f"the nemotron-nas layout has no such factor: config.{name} = {value}")
    _check_positions(model, config, parts)


def _check_window(model: nn.Module, config: Any, parts: DecoderParts) -> None:
    reach = getattr(config, "max_position_embeddings", None) or 0
    windows = {"config": getattr(config, "sliding_window", None)}
    for layer in parts.layers:
        if layer.has_attention:
            path = layer.modules["attention"]
            windows[path] = getattr(model.get_submodule(path), "sliding_window", None)
    for where, window in windows.items():
        if window is not None and window < reach:
            raise CheckpointError(f"the nemotron-nas layout has no sliding window ({where}.sliding_window = {window})")
    types = set(getattr(config, "layer_types", None) or ())
    if others := types - {"full_attention"}:
        raise CheckpointError(
            f"the nemotron-nas layout has one kind of attention, and config.layer_types has {sorted(others)}"
        )


def _check_positions(model: nn.Module, config: Any, parts: DecoderParts) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise CheckpointError(
            f"the nemotron-nas layout has one rotary embedding for all layers; config.rope_parameters is {rope!r}"
        )
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if part not in (None, 1, 1.0):
        raise CheckpointError(
            f"the nemotron-nas layout rotates whole heads; the model rotates {part} of each (partial_rotary_factor)"
        )
    without = [number for number, flag in enumerate(getattr(config, "no_rope_layers", None) or ()) if not flag]
    if without:
        raise CheckpointError(
            f"the nemotron-nas layout rotates in every layer; config.no_rope_layers leaves out layer {without[0]}"
        )
    for layer in parts.layers:
        path = layer.modules.get("attention")
        module = None if path is None else model.get_submodule(path)
        scaling, head = getattr(module, "scaling", None), getattr(module, "head_dim", None)
        if isinstance(scaling, float) and isinstance(head, int) and abs(scaling * head**0.5 - 1) > 1e-6:
            raise CheckpointError(
                f"the nemotron-nas layout scales attention by head_dim ** -0.5; {path}.scaling is {scaling:g}"
            )


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
