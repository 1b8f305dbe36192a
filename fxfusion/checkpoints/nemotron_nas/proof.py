"""Proof that a layout says the model: the decoder that its files build computes the same, from the same tensors.

No tensor is copied: the twin's parameters are the model's own, or views into them. Zeros that the files add are left
out here, since they change no sum. Without weights, the graphs of a decoder with one layer of each kind are compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.layout import Layout
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.errors import CaptureError, CheckpointError, SurgeryError
from fxfusion.models.fingerprint import decoder_layers
from fxfusion.models.surgery_proof import check_same_graph, full_logits, proof_tokens, relative
from fxfusion.models.traced import TracedModel

_FACTS_ONLY = "tensors, norms, FFNs and settings were checked, but without weights not the whole computation"
_ALLOWED = 16  # times the dtype's epsilon: the same operations, spelled in another way
_PLAIN = (bool, int, float, str, type(None))
_NUMBERS = (
    "layer_idx",
    "layer_id",
    "layer",
    "intermediate_size",
    "in_features",
    "out_features",
)  # differ and say nothing


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


def one_of_each_kind(model: nn.Module) -> list[int]:
    """The first layer of each kind: of the same modules, with the same settings, of whatever width."""
    _, layers = decoder_layers(model)
    first: dict[Any, int] = {}
    for number, layer in enumerate(layers):
        kind = tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())
        first.setdefault(kind, number)
    return list(first.values())


def with_layers(model: nn.Module, kept: list[int]) -> nn.Module:
    """A model with these decoder layers, around the modules and the parameters of the given one."""
    path, layers = decoder_layers(model)
    short: Any = _shallow(model)
    holder = short
    for step in path.split(".")[:-1]:
        inner = _shallow(getattr(holder, step))
        holder._modules[step] = inner
        holder = inner
    holder._modules[path.rpartition(".")[2]] = nn.ModuleList(layers[number] for number in kept)
    config = copy.deepcopy(short.config)
    decoder = config.get_text_config(decoder=True)
    for name, value in vars(decoder).items():
        if isinstance(value, list) and len(value) == len(layers):
            setattr(decoder, name, [value[number] for number in kept])
    decoder.num_hidden_layers = len(kept)
    for owner in (short, holder):
        owner.config = config if owner is short else decoder
    shortened: nn.Module = short
    return shortened


def _shallow(module: Any) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple(sorted((name, value) for name, value in found.items() if name not in _NUMBERS))
