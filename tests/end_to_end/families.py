"""Tiny random transformers models without attention, and their parallel form in plain eager code.

A `Family` says how to build a model of one family and where its layers, its attention and its norms
are. Nothing here uses the compiler: `parallel_form` runs the user's own modules under hooks, so it is
an independent answer to what the fused graph must compute.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SIZES: Mapping[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of transformers.

    `layers`: path of the list of layers. `mixers`: what to remove in each layer but the first, by path
    in the layer. `stub`: what takes its place: `"zero"` (the number 0), `"zeros"` (a tensor) or `"same"`
    (its own input, for blocks that add the residual themselves); `arity`: how many values it returns,
    0 for a bare one. `norms`: norms that feed or follow nothing but attention. `ffn_norm`: the FFN's own
    norm. `limit`: allowed relative error, 1e-6 where the model applies its norms in float32. `fused`: how
    many FFNs fuse under `include_leading=False`. `passes`: how often the layers run, each time as a chain
    of its own. `refused`: the code expected where nothing fuses.
    """

    name: str
    layers: str = "model.layers"
    mixers: Sequence[str] = ("self_attn",)
    stub: str = "zero"
    arity: int = 2
    norms: Sequence[str] = ("input_layernorm",)
    ffn_norm: str = "post_attention_layernorm"
    limit: float = 1e-10
    kind: str = "causal"
    dtype: torch.dtype = torch.float64
    config: Mapping[str, Any] = field(default_factory=dict)
    fused: int = 3
    passes: int = 1
    refused: str = ""
    variant: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


class Stub(nn.Module):
    """Takes the place of a removed mixer."""

    def __init__(self, kind: str, arity: int) -> None:
        super().__init__()
        self.kind, self.arity = kind, arity

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value: Any = 0
        if self.kind != "zero":
            hidden = args[0] if args else kwargs["hidden_states"]
            value = hidden if self.kind == "same" else torch.zeros_like(hidden)
        return value if self.arity == 0 else (value, *(None,) * (self.arity - 1))


def make_model(family: Family, seed: int = 0) -> nn.Module:
    """The family's model in its dtype (float64) and eval mode, random, attention in its first layer only."""
    torch.manual_seed(seed)
    model = build(family).to(family.dtype).eval()
    randomise(model, seed)
    remove_mixers(model, family)
    return model


def build(family: Family) -> nn.Module:
    """The family's model, tiny, as transformers initialises it."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    known = AutoConfig.for_model(family.name)
    sizes = {key: value for key, value in SIZES.items() if _settable(type(known), key)}
    config = AutoConfig.for_model(family.name, **(sizes | dict(family.config)))
    maker = AutoModelForCausalLM if family.kind == "causal" else AutoModel
    return maker.from_config(config, attn_implementation="eager")


def _settable(config: type, key: str) -> bool:
    found = inspect.getattr_static(config, key, None)
    return not isinstance(found, property) or found.fset is not None


def randomise(model: nn.Module, seed: int) -> None:
    """Weights of gain about one, gains around one, biases well away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *_float_buffers(model)]:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.dim() >= 2:
                is_table = "embed" in name and value.dim() == 2
                value.copy_(noise if is_table else noise * 1.3 / math.sqrt(value[0].numel()))
            elif name.endswith("bias"):
                value.copy_(0.3 * noise)
            else:
                value.copy_(1.0 + 0.4 * noise)


def _float_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in model.named_buffers() if name.endswith("final_logits_bias")]


def layers_of(model: nn.Module, family: Family) -> list[nn.Module]:
    return list(model.get_submodule(family.layers).children())


def remove_mixers(model: nn.Module, family: Family) -> None:
    """Attention out of every layer but the first, in place, and with it the norms that serve only it."""
    for layer in layers_of(model, family)[1:]:
        for path in family.mixers:
            if _has(layer, path):
                layer.set_submodule(path, Stub(family.stub, family.arity))
        for path in family.norms:
            layer.set_submodule(path, nn.Identity())


def _has(layer: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in layer.named_modules())


def make_inputs(family: Family, model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Batch 2, 5 tokens (or one image each)."""
    generator = torch.Generator().manual_seed(seed)
    if family.kind == "vision":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 97, (2, 5), generator=generator)
    if family.kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return {"input_ids": ids}


def first_tensor(output: Any) -> torch.Tensor:
    """Logits or hidden states of whatever a model returns."""
    value = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(value, torch.Tensor)
    return value


def run(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(**inputs)).clone()


def parallel_form(
    model: nn.Module, family: Family, inputs: Mapping[str, Any], *, leading: bool = False, last_norm: bool = False
) -> torch.Tensor:
    """The model's output with every layer but the first reading the same stream x.

    Each layer without attention is `x + F(x)`, so `F(x)` is the layer minus its input. The stream x is
    what enters the second layer; with `leading`, what enters the first layer's own FFN. With
    `last_norm`, every member uses the norm of the last one.
    """
    layers = layers_of(model, family)
    sum_of = _Sum(len(layers) - 1)
    with ExitStack() as stack:
        if leading:
            norm = layers[0].get_submodule(family.ffn_norm)
            stack.enter_context(_hook(norm.register_forward_pre_hook(sum_of.enter, with_kwargs=True)))
            stack.enter_context(_hook(layers[0].register_forward_hook(sum_of.leave_first)))
        for index, layer in enumerate(layers[1:]):
            before = sum_of.reader(is_first=index == 0 and not leading)
            stack.enter_context(_hook(layer.register_forward_pre_hook(before, with_kwargs=True)))
            stack.enter_context(_hook(layer.register_forward_hook(sum_of.leave)))
        if last_norm:
            stack.enter_context(shared_norm(layers[0 if leading else 1 :], family.ffn_norm))
        found = run(model, inputs)
    assert (sum_of.passes, sum_of.count) == (family.passes, 0), "a layer did not run exactly once a pass"
    return found


class _Sum:
    """Feeds x to every layer and hands x plus the sum of all branches to what follows the last."""

    def __init__(self, members: int) -> None:
        self.members, self.count, self.passes = members, 0, 0
        self.x: torch.Tensor
        self.total: torch.Tensor

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.x = args[0] if args else kwargs["hidden_states"]
        self.total = self.x

    def leave_first(self, module: nn.Module, args: Any, output: Any) -> None:
        """The first layer's output is x plus its own FFN; its norm may have seen x as `[tokens, hidden]`."""
        out = first_tensor(output)
        self.x, self.total = self.x.reshape(out.shape), out

    def reader(self, is_first: bool) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if is_first:
                self.enter(module, args, kwargs)
            if args:
                return (self.x, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self.x}

        return before

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.total = self.total + first_tensor(output) - self.x
        self.count += 1
        value = self.x
        if self.count == self.members:
            value, self.count, self.passes = self.total, 0, self.passes + 1
        if isinstance(output, torch.Tensor):
            return value
        return type(output)((value, *output[1:]))


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def shared_norm(layers: Sequence[nn.Module], path: str) -> Iterator[None]:
    """Every layer has the last one's norm inside. `path`: of the norm in a layer."""
    own = [layer.get_submodule(path) for layer in layers]
    try:
        for layer in layers:
            layer.set_submodule(path, own[-1])
        yield
    finally:
        for layer, norm in zip(layers, own, strict=True):
            layer.set_submodule(path, norm)


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest reference value."""
    return float((value - reference).abs().max() / reference.abs().max())


def disturb(model: nn.Module, family: Family) -> None:
    """Change the last layer's FFN a little, in place: every matrix of it by 1 %."""
    with torch.no_grad():
        for value in layers_of(model, family)[-1].parameters():
            if value.dim() == 2:
                value.mul_(1.01)


def hide_names(model: nn.Module) -> nn.Module:
    """A copy in which no class carries a name that means anything."""
    hidden = copy.deepcopy(model)
    classes: dict[type, type] = {}
    for module in hidden.modules():
        kind = type(module)
        if not kind.__module__.startswith("torch."):
            renamed = classes.setdefault(kind, type(f"C{len(classes)}", (kind,), {"__module__": "nowhere"}))
            module.__class__ = renamed
    return hidden
