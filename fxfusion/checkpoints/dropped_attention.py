"""Proof that attention whose weights are zero adds nothing, so that plain transformers gives the model without it.

    embedding, one dropped layer of each kind, final norm, head:  logits with zeros = logits of the model without

Zeros do it for almost every attention; one that divides by the length of its queries gives no numbers at all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxfusion.checkpoints.empty_model import empty_model
from fxfusion.checkpoints.filling import Filling
from fxfusion.checkpoints.model_tensors import own_tensors
from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.errors import CheckpointError
from fxfusion.models.fingerprint import decoder_layers
from fxfusion.models.no_attention import NoAttention, NoNorm
from fxfusion.models.surgery_proof import full_logits, proof_tokens, relative

_SAME = 4  # times the dtype's epsilon


def prove_zeros(reader: CheckpointReader, config: Any, without: Mapping[int, nn.Module]) -> None:
    """Run what was written, on a few tokens, with the attention of zeros and without it.

    `config`: of the intact model. `without`: the layers that lost their attention, by number, as the model that was
    saved has them. Needs the memory of a few layers. Raises `CheckpointError` where the logits differ.
    """
    model = empty_model(copy.deepcopy(config), config.dtype)
    path, layers = decoder_layers(model)
    kinds = {_kind(layers[number]): number for number in sorted(without, reverse=True)}
    chosen = sorted(kinds.values())
    names = [name for name in own_tensors(model) if layer_number(name, path) in (None, *chosen)]
    Filling(reader=reader, stored={name: name for name in names}, dtypes={}).some(model, names)
    model.set_submodule(path, nn.ModuleList(layers[number] for number in chosen))
    ids = proof_tokens(model)
    with_zeros = full_logits(model, ids)
    for place, number in enumerate(chosen):
        for name, module in without[number].named_modules():
            if isinstance(module, (NoAttention, NoNorm)):
                model.set_submodule(f"{path}.{place}.{name}", copy.deepcopy(module).to(ids.device))
    expected = full_logits(model, ids)
    error = relative(with_zeros, expected)
    limit = _SAME * torch.finfo(expected.dtype).eps
    if not error <= limit:
        raise CheckpointError(
            f"the attention of layer {chosen[0]} adds something even if all its weights are zero (logits off by "
            f"{error:.2g}, allowed {limit:.2g}), so no folder that plain transformers loads can leave it out"
        )


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Layers of one kind have modules of the same classes with parameters of the same sizes."""
    classes = tuple((name, type(module)) for name, module in layer.named_modules())
    return classes, tuple((name, value.shape) for name, value in layer.named_parameters())


def layer_number(name: str, path: str) -> int | None:
    """The number of the decoder layer that a tensor is in; None for one outside."""
    first = name.removeprefix(f"{path}.").split(".")[0]
    return int(first) if name.startswith(f"{path}.") and first.isdigit() else None
