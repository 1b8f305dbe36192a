"""Write a model as Model-Optimizer (Puzzletron) lays out models whose layers differ: `format="anymodel"`.

    config.json: the family's own, and "block_configs": one entry for each layer, with
        "attention": {"no_op": false, "num_key_value_heads": 8, ...}, "ffn": {"no_op": false, "intermediate_size": 4096}
    model*.safetensors: by the family's names; what a layer has not has no tensor

Keys are those of `AttentionConfig` and `FFNConfig` in modelopt/torch/puzzletron/block_config.py (August 2026). Engines
read it through Model-Optimizer, whose adapter gives vLLM a `per_layer_config`; fxfusion reads it by itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxfusion.checkpoints.canonical_load import load
from fxfusion.checkpoints.companions import CardText, write_beside
from fxfusion.checkpoints.empty_model import own_tensors
from fxfusion.checkpoints.folder import replacing
from fxfusion.checkpoints.per_layer.export import check_model, layer_types, refuse_meta, write_around
from fxfusion.checkpoints.per_layer.proof import check_logits
from fxfusion.checkpoints.per_layer.settings import OWN, LayerSettings
from fxfusion.checkpoints.per_layer.stack import block_of
from fxfusion.checkpoints.shards import DEFAULT_SHARD_SIZE, TensorFacts, write_shards
from fxfusion.cost.layer_forms import BLOCKS, KNOWN
from fxfusion.errors import CheckpointError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.cache_slots import SHARING_NAMES, is_computed
from fxfusion.models.drop_record import NAME
from fxfusion.models.ffn_surgery.stubs import NoFfn
from fxfusion.models.fingerprint import decoder_layers
from fxfusion.models.no_attention import NoAttention

_KV_HEADS, _WIDTH = "num_key_value_heads", "intermediate_size"
_DECILM = "nemotron-nas"


@dataclass(frozen=True, slots=True)
class AnyModelPlan:
    """What would be written. `config`: the content of config.json; `tensors`: names, shapes and dtypes."""

    config: dict[str, Any]
    tensors: list[TensorFacts]

    @classmethod
    def of(cls, model: nn.Module) -> AnyModelPlan:
        """Works on the meta device. Raises `CheckpointError` for what a block cannot say, by layer and setting."""
        bare: Any = bare_model(model)
        check_model(bare)
        facts = [TensorFacts.of(name, value) for name, value in own_tensors(bare).items()]
        return cls(_config(bare), facts)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.tensors)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: bool = False,
    card: CardText | None = None,
    overwrite: bool = False,
) -> AnyModelPlan:
    """Write a model with its layers as they are. All of it or nothing; the model stays as it is.

    What was written is read again and its logits compared, which takes the memory of the model a second time. Arguments
    and errors as of `fxfusion.save_pretrained`; `card` makes the content of README.md.
    """
    bare: Any = bare_model(model)
    plan = AnyModelPlan.of(bare)
    refuse_meta(bare)
    with replacing(directory, overwrite=overwrite) as folder:
        write_around(folder, bare, plan.config)
        write_beside(folder, bare, tokenizer, card)
        write_shards(folder, plan.tensors, own_tensors(bare).items(), max_shard_size, progress)
        check_logits(bare, load(folder, dtype=bare.dtype, device=bare.device), "the anymodel format")
    return plan


def _config(model: Any) -> dict[str, Any]:
    config = copy.deepcopy(model.config)
    types = layer_types(config)
    if types is not None and not is_computed(config, "layer_types"):
        config.layer_types = types
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in (NAME, KNOWN, BLOCKS, "auto_map", *SHARING_NAMES):
        data.pop(name, None)
    if model.config.model_type == _DECILM:
        from transformers import LlamaConfig, LlamaForCausalLM

        known = LlamaConfig().to_dict()
        data = {name: value for name, value in data.items() if name in known}
        data |= {"model_type": LlamaConfig.model_type, "architectures": [LlamaForCausalLM.__name__]}
    else:
        data["architectures"] = [type(model).__name__]
    blocks = list(_blocks(model))
    return data | {"dtype": str(model.dtype).removeprefix("torch."), "num_hidden_layers": len(blocks), BLOCKS: blocks}


def _blocks(model: Any) -> Iterator[dict[str, Any]]:
    """One entry for each layer of the model."""
    config, (_, layers) = model.config, decoder_layers(model)
    settings = None if config.model_type == _DECILM else LayerSettings(type(layers[0]), config)
    layer: Any
    for number, layer in enumerate(layers):
        kinds = {type(module) for module in layer.modules()}
        attention, ffn = NoAttention not in kinds, NoFfn not in kinds
        if settings is None:
            attention, ffn = attention and layer.has_attention, ffn and layer.has_ffn
            own = {_KV_HEADS: layer.self_attn.k_proj.out_features // config.head_dim} if attention else {}
            own |= {_WIDTH: layer.mlp.up_proj.out_features} if ffn else {}
        else:
            own = settings.of(block_of(number, layer), number)
            if other := next((name for name in own if name not in (_KV_HEADS, _WIDTH)), None):
                what = next(iter(own[OWN])) if other == OWN else f"{other} = {own[other]}"
                raise CheckpointError(
                    "the anymodel format has a number of key-value heads and a width for each layer, and layer "
                    f"{number} needs {what}; format='transformers' has a word for it"
                )
            own = {_KV_HEADS: getattr(config, _KV_HEADS, None), _WIDTH: getattr(config, _WIDTH, None)} | own
        yield {"attention": _part(attention, _KV_HEADS, own, number), "ffn": _part(ffn, _WIDTH, own, number)}


def _part(there: bool, name: str, own: dict[str, Any], number: int) -> dict[str, Any]:
    if there and type(own.get(name)) is not int:
        raise CheckpointError(f"the anymodel format needs {name}, which the config of layer {number} has not")
    return {"no_op": not there, "replace_with_linear": False, "sparsify": None, name: own[name] if there else None}
