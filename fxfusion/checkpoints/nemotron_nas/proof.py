"""Proof that a layout says the model: the decoder that its files build computes the same, from the same tensors.

No tensor is copied: the twin's parameters are the model's own, or views into them. Zeros that the files add are left
out here, since they change no sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.layout import Layout
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.checkpoints.nemotron_nas.shorten import one_of_each_kind, with_layers
from fxfusion.errors import CaptureError, CheckpointError, SurgeryError
from fxfusion.models.same_graph import check_same_graph
from fxfusion.models.surgery_proof import full_logits, proof_tokens, relative
from fxfusion.models.traced import TracedModel

_FACTS_ONLY = "tensors, norms, FFNs and settings were checked, but without weights not the whole computation"
_ALLOWED = 16  # times the dtype's epsilon: the same operations, spelled in another way


def prove(model: nn.Module, layout: Layout) -> str:
    """What was proved, as a sentence for people. On the meta device, where there are no logits, graphs are compared.

    Raises `CheckpointError` where the logits differ.
    """
    ids = proof_tokens(model)
    if ids.is_meta:
        return _compare_graphs(model, ids)
    twin = build(layout, ids.device)
    error = relative(full_logits(twin, ids), full_logits(model, ids))
    coarsest = max(torch.finfo(dtype).eps for dtype in (layout.pieces[0].facts.dtype, torch.float32))
    limit = _ALLOWED * coarsest  # norms and angles are computed in float32 whatever the parameters are
    if not error <= limit:
        raise CheckpointError(
            "the nemotron-nas layout cannot say this model: tensors and settings fit, but the logits are off by "
            f"{error:.2g} (allowed {limit:.2g}), so {type(model).__name__} computes something that they do not show"
        )
    return f"logits of {ids.numel()} tokens compared with the model in memory: off by {error:.1g}"


def build(layout: Layout, device: torch.device) -> DeciLMForCausalLM:
    """The decoder of a layout, around the model's own tensors."""
    twin = empty_decoder(layout.config)
    give_angles(twin, device)
    for piece in layout.pieces:
        if piece.source is None:
            value = torch.zeros(piece.facts.shape, dtype=piece.facts.dtype, device=device)
        else:
            value = piece.source.of(layout.state)
        put(twin, piece.facts.name, value)
    return finish(twin)


def empty_decoder(config: DeciLMConfig) -> DeciLMForCausalLM:
    """A decoder in eval mode without memory: all of it is on the meta device."""
    with torch.device("meta"):
        decoder = DeciLMForCausalLM(config)
    decoder.train(False)
    return decoder


def give_angles(decoder: DeciLMForCausalLM, device: torch.device | str) -> None:
    """Compute what a decoder holds besides its parameters: the frequencies of the rotary embedding."""
    with torch.device(device):
        decoder.model.rotary_emb = type(decoder.model.rotary_emb)(config=decoder.config)


def put(decoder: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor a parameter, the very same object if it is one."""
    path, _, leaf = name.rpartition(".")
    owned = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    decoder.get_submodule(path).register_parameter(leaf, owned)


def finish(decoder: DeciLMForCausalLM) -> DeciLMForCausalLM:
    """Tie the head where the config says so."""
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder


def _compare_graphs(model: nn.Module, ids: Tensor) -> str:
    """Compare without weights, on one layer of each kind: large models have many that are alike."""
    short = with_layers(model, one_of_each_kind(model))
    twin = build(Layout.of(short), ids.device)
    ours = twin.model.rotary_emb
    angles = [value for name, value in model.named_buffers() if name.rpartition(".")[2] == "inv_freq"]
    if len(angles) == 1 and angles[0].shape == ours.inv_freq.shape:  # made from the config, which was compared
        ours.inv_freq = angles[0]
    try:
        check_same_graph(twin, TracedModel(short).graph(ids), (), ids)
    except CaptureError as error:
        return f"{_FACTS_ONLY}, since {type(model).__name__} is not captured as one graph: {error}"
    except SurgeryError:
        return f"{_FACTS_ONLY}, since {type(model).__name__} spells it in another way"
    return "the captured graphs of one layer of each kind are the same, operation by operation"
