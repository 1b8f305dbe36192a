"""The hoisted form of a window of layers, in plain eager PyTorch: attention by attention, then every FFN on one stream.

    x <- x + A_a(x); ...; x <- x + A_b(x)          then          x <- x + F_a(x) + ... + F_b(x)
    wide: x <- x + A_a(x) + ... + A_b(x)

Nothing here uses fxfusion. A layer's attention is what its FFN, or the norm before it, reads; its FFN is what the layer
adds to its input while its attention is a stub. So the layers' own code runs, with their own masks, scales and caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tests.end_to_end.families import Family, Stub, first_tensor, layers_of, shared_norm


@contextmanager
def hoisted(
    model: nn.Module,
    family: Family,
    windows: Sequence[Sequence[int]],
    *,
    wide: bool = False,
    last_norm: bool = False,
) -> Iterator[nn.Module]:
    """The model, which computes its hoisted form inside. `wide`: the attentions of a window read one stream too;
    `last_norm`: its FFNs read that through the norm of the last."""
    container: Any = model.get_submodule(family.layers)
    layers = layers_of(model, family)
    try:
        for window in windows:
            members = [layers[number] for number in window]
            worker = container[window[0]] = HoistedLayers(members, family, wide, last_norm)
            for number in window[1:]:
                container[number] = Passed(layers[number], worker)
        yield model
    finally:
        for number, layer in enumerate(layers):
            container[number] = layer


class _Named(nn.Module):
    """Stands in for a layer: what the model asks it for besides its forward comes from the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.of = [layer]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.of[0], name)


class Passed(_Named):
    """A layer whose work was done before; its output looks like that of the layer that did it."""

    def __init__(self, layer: nn.Module, worker: HoistedLayers) -> None:
        super().__init__(layer)
        self.worker = [worker]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream,) if self.worker[0].returns_tuple else stream


class HoistedLayers(_Named):
    """All the attentions of a window, then all its FFNs."""

    def __init__(self, layers: Sequence[nn.Module], family: Family, wide: bool, last_norm: bool) -> None:
        super().__init__(layers[0])
        self.layers, self.family = list(layers), family
        self.wide, self.last_norm, self.returns_tuple = wide, last_norm, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        entry = stream = args[0] if args else kwargs["hidden_states"]
        output: Any = None
        for layer in self.layers:
            read = entry if self.wide else stream
            after, output = self._attended(layer, read, args, kwargs)
            stream = stream + (after - read) if self.wide else after
        total = stream
        with shared_norm(self.layers, self.family.ffn_norm) if self.last_norm else nullcontext():
            for layer in self.layers:
                with _stubbed(layer, self.family):
                    alone = first_tensor(_call(layer, stream, args, kwargs))
                total = total + (alone - stream)
        self.returns_tuple = not isinstance(output, Tensor)
        return total if isinstance(output, Tensor) else (total, *output[1:])

    def _attended(self, layer: nn.Module, stream: Tensor, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
        """The stream after the layer's attention: what its FFN, or the norm before it, reads."""
        seen: list[Tensor] = []
        reader = layer.get_submodule(self.family.ffn_norm or "mlp")
        handle = reader.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            output = _call(layer, stream, args, kwargs)
        finally:
            handle.remove()
        return seen[0].reshape(stream.shape), output


def _call(layer: nn.Module, stream: Tensor, args: Any, kwargs: Any) -> Any:
    return layer(stream, *args[1:], **kwargs) if args else layer(**(kwargs | {"hidden_states": stream}))


@contextmanager
def _stubbed(layer: nn.Module, family: Family) -> Iterator[None]:
    paths = [path for path in family.mixers if any(name == path for name, _ in layer.named_modules())]
    own = [(path, layer.get_submodule(path)) for path in (*paths, *family.norms)]
    try:
        for path in paths:
            layer.set_submodule(path, Stub(family.stub, family.arity))
        for path in family.norms:
            layer.set_submodule(path, nn.Identity())  # some are behind the attention, and read its stub
        yield
    finally:
        for path, module in own:
            layer.set_submodule(path, module)


@torch.no_grad()
def hoisted_by_hand(model: Any, windows: Sequence[Sequence[int]], ids: Tensor, *, wide: bool = False) -> Tensor:
    """Logits of a Llama-like model's hoisted form, written out; it checks `hoisted`, which the other families use.
    `wide`: the attentions of a window read one stream too."""
    inner = model.model
    x = inner.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    given = {"position_embeddings": inner.rotary_emb(x, places), "position_ids": places}
    count = ids.shape[1]
    mask = torch.full((count, count), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    window_of = {window[0]: list(window) for window in windows}
    number = 0
    while number < len(inner.layers):
        window = [inner.layers[member] for member in window_of.get(number, [number])]
        entry = x
        for layer in window:
            read = layer.input_layernorm(entry if wide else x)
            x = x + layer.self_attn(hidden_states=read, attention_mask=mask, **given)[0]
        x = x + sum(layer.mlp(layer.post_attention_layernorm(x)) for layer in window)
        number += len(window)
    logits: Tensor = model.lm_head(inner.norm(x))
    return logits
