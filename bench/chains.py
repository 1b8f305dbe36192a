"""A chain of FFNs in every form that a user could run it in: same weights, same input, same Inductor settings.

    eager                 the modules one after the other
    unfused               torch.compile of that; "unfused again" is the control that must show no difference
    fused                 torch.compile(backend=ffn_fusion)
    surgery               fxfusion.fuse on the modules, then plain torch.compile
    concatenated by call  the wide FFN made from the members' weights inside the graph, at each call

Each compiled form also comes in Inductor's other modes, such as "fused, max-autotune".
"""

from __future__ import annotations

import copy
import time
import types
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import fxfusion
from bench.shapes import Cell

Run = Callable[[Tensor], Tensor]
COMPILED = ("unfused", "fused", "surgery")
_serial = count()


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
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=max(widths),
        num_hidden_layers=len(widths),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=32,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
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


def first_calls(runs: dict[str, Run], chain: Chain, x: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the first call, and how far each result is from what it should be, relative to the branch.

    Raises `RuntimeError` where a form computes something else: its speed would mean nothing.
    """
    sequential, parallel = chain(x), chain.parallel(x)
    limit = 0.05 if x.dtype == torch.bfloat16 else 1e-3
    seconds, errors = {}, {}
    for name, run in runs.items():
        wanted = sequential if name.startswith(("eager", "unfused")) else parallel
        start = time.perf_counter()
        output = run(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        errors[name] = float((output.float() - wanted.float()).norm() / (wanted.float() - x.float()).norm())
        if not errors[name] <= limit:
            raise RuntimeError(f"{name} is off by {errors[name]:.2g}, allowed {limit}")
    return seconds, errors
