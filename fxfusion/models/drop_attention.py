"""Drop the attention of some decoder layers: the modules, the norms that serve only them, and their cache slots.

Before:  y = x + attention(norm(x));  z = y + ffn(norm'(y))
After:   y = x + 0;                   z = y + ffn(norm'(y))      no parameter of `attention` and `norm` is left

Works for any decoder: what holds the attention, what serves only it and what stands in for it is read off the
captured graph and one forward pass, and the result is proved before it is kept. Layers keep their numbers.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TypeVar

from torch import nn

from fxfusion.compiler.unwrap import offloaded
from fxfusion.errors import SurgeryError
from fxfusion.models.adapters.carrier import Adapters
from fxfusion.models.attention_surgery import AttentionSurgery
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_record import write_record
from fxfusion.models.plain_save import warn_of_plain_save
from fxfusion.models.surgery_proof import Proof
from fxfusion.models.traced import TracedGraph

Model = TypeVar("Model", bound=nn.Module)


def drop_attention(model: Model, layers: Iterable[int], *, check: bool = True) -> Model:
    """Drop the attention (or other token mixer) of decoder layers, in place.

    The attention modules become stubs without parameters, norms that serve nothing else become identities. The
    surviving attentions are numbered anew in the key-value cache, so that `generate` and every cache built from
    `model.config` stay right; `config.layer_types` follows, and `config.fxfusion` records what was dropped. May be
    called again for more layers. Other users of the same config object see its changes; `QuantizedCache` refuses a
    config with unused slots.

    Args:
        model: a decoder of `transformers`, compiled or not, on any device, the meta device included. Its mode,
            `requires_grad` and remaining parameters are untouched; so are PEFT's adapters of other modules.
        layers: positions of decoder layers in the model as it was loaded. All of them is allowed, with a warning.
        check: run the model on a few tokens to prove that its logits are those of the intact model's graph without
            these mixers, and that cached decoding equals the full computation. Without it, and on the meta device,
            the graphs are compared instead, and cache slots by their kind alone.

    Returns:
        The same model.

    Raises:
        SurgeryError: bad layer numbers, a model that is no causal decoder, or one where a proof fails; it says why.
            The model is then as it was.
    """
    bare = bare_model(model)  # what `torch.compile` returned compiles anew then
    numbers = _layer_numbers(layers)
    if offloaded(bare):
        raise SurgeryError(f"attention cannot be dropped: {offloaded(bare)}; load it whole")
    with ExitStack() as undo:
        taken = Adapters.taken_off(model, bare, "carry", undo)
        drop_traced(bare, numbers, check)
        undo.pop_all()
    taken.put_on()
    return model


def drop_traced(
    bare: nn.Module,
    layers: list[int],
    check: bool,
    traced: TracedGraph | None = None,
    whole: ExitStack | None = None,
) -> None:
    """`drop_attention` for a model whose graph, for the tokens of the proof, may be known already.

    `whole`: a larger operation that may have to take this one back, and holds what is dropped until it closes.
    """
    surgery = AttentionSurgery.plan(bare, layers, traced)
    proof = None
    if check and not surgery.ids.is_meta:
        proof = Proof.of_intact(bare, surgery.traced, surgery.removed, surgery.ids)
    else:
        surgery.refuse_encoders()
    with ExitStack() as undo:
        surgery.renumber_cache(undo, proof)
        surgery.put_stubs(undo, proof)
        surgery.prove_cache(undo, proof)
        write_record(bare.config, surgery.record(), undo)
        warn_of_plain_save(bare, undo)
        done = undo.pop_all()
    if whole is not None:
        whole.callback(done.close)
    if not surgery.survivors:
        warnings.warn("no layer has attention any more: tokens cannot see each other", stacklevel=3)


def _layer_numbers(layers: Iterable[int]) -> list[int]:
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise SurgeryError(f"layers must be a list of layer numbers, not {layers!r}")
    numbers = []
    for layer in layers:
        try:
            numbers.append(operator.index(layer))
        except TypeError:
            raise SurgeryError(f"{layer!r} is no layer number") from None
        if isinstance(layer, bool) or numbers[-1] < 0:
            raise SurgeryError(f"{layer!r} is no layer number: layers are counted from 0")
    if not numbers:
        raise SurgeryError("no layer was named: nothing to drop")
    repeated = [number for number in numbers if numbers.count(number) > 1]
    if repeated:
        raise SurgeryError(f"layer {repeated[0]} is named twice")
    return sorted(numbers)
