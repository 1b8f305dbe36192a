"""Write a decoder as a nemotron-nas folder, which other engines load; or say what would be written.

config.json, configuration_decilm.py, modeling_decilm.py, generation_config.json, tokenizer files, README.md
model-00001-of-00002.safetensors, ..., model.safetensors.index.json
fxfusion_plan.yaml, fxfusion_residue.st         of a fused model: what gives its members back
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from fxfusion.checkpoints.companions import CardText, write_beside
from fxfusion.checkpoints.folder import replacing, write_file
from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.layout import Layout
from fxfusion.checkpoints.nemotron_nas.members import write_members
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.checkpoints.nemotron_nas.proof import empty_decoder, prove
from fxfusion.checkpoints.quantised import check_layers, engines_of_quantised, linear_layers, quantise
from fxfusion.checkpoints.shards import DEFAULT_SHARD_SIZE, ShardLayout, TensorFacts, write_shards
from fxfusion.errors import CheckpointError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.models.weight_grid import WeightGrid

CODE_FILES = ("configuration_decilm.py", "modeling_decilm.py")
_SCALED_BY_MLX = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What would be written.

    `config`: the content of config.json. `tensors`: names, shapes and dtypes. `shards`: in which files. `engines`: for
    each, None if it can load the folder, else why not. `proof`: what was checked.
    """

    config: dict[str, Any]
    tensors: list[TensorFacts]
    shards: ShardLayout
    engines: dict[str, str | None]
    proof: str

    @property
    def nbytes(self) -> int:
        return self.shards.nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tensors = [
            {"name": one.name, "shape": list(one.shape), "dtype": str(one.dtype).removeprefix("torch."), "file": file}
            for file, group in self.shards.files.items()
            for one in group
        ]
        return {
            "config": self.config,
            "tensors": tensors,
            "index": self.shards.index(),
            "bytes": self.nbytes,
            "engines": self.engines,
            "proof": self.proof,
        }


def plan_export(model: nn.Module, *, max_shard_size: int | str = DEFAULT_SHARD_SIZE, check: bool = True) -> ExportPlan:
    """What `save` would write, without writing. Works on the meta device, without any weight.

    Args:
        model: a causal language model of transformers: intact, without some attention, or fused.
        max_shard_size: bytes, or text such as `"500MB"`.
        check: compare what the layout computes with the model, by logits or, on the meta device, by graphs.

    Raises:
        CheckpointError: what the layout cannot say, by the name of the module, tensor or setting.
    """
    return _plan(model, max_shard_size, check)[0]


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: bool = False,
    card: CardText | None = None,
    check: bool = True,
    overwrite: bool = False,
    grid: WeightGrid | None = None,
) -> ExportPlan:
    """Write a causal language model as a nemotron-nas folder, all of it or nothing. The model stays as it is.

    Args:
        model, max_shard_size, check: as of `plan_export`.
        directory: a new or empty folder, or one that fxfusion wrote and nobody changed since, which is replaced.
        tokenizer: one of transformers, written beside the model; None writes none.
        progress: say how far it is, on the error stream.
        card: the content of README.md, by what `engines_that_load` says.
        overwrite: replace a folder by others, with all that is in it.
        grid: what the linear layers are rounded to. Such a folder keeps no members: they could not be told apart.

    Raises:
        CheckpointError: what the layout cannot say, or a folder that cannot be written. Nothing was changed then.
    """
    plan, layout = _plan(model, max_shard_size, check)
    bare: Any = bare_model(model)
    if any(value.is_meta for value in layout.state.values()):
        raise CheckpointError("the model is on the meta device: there are no weights to write (plan_export needs none)")
    decoder = empty_decoder(layout.config)
    if grid is not None:
        check_layers(decoder, grid)
    with replacing(directory, overwrite=overwrite) as folder:
        write_file(folder / "config.json", json.dumps(plan.config, indent=2, sort_keys=True) + "\n")
        for name in CODE_FILES:
            write_file(folder / name, (resources.files(__package__) / name).read_text("utf-8"))
        engines = plan.engines if grid is None else engines_of_quantised(plan.engines)
        write_beside(folder, bare, tokenizer, card, engines)
        if grid is None:
            write_members(folder, bare)
        values = ((piece.facts.name, piece.take(layout.state)) for piece in layout.pieces)
        write_shards(folder, plan.tensors, values, max_shard_size, progress)
        if grid is not None:
            names = {f"{name}.weight" for name in linear_layers(decoder)}
            quantise(folder, DeciLMForCausalLM, names, grid, max_shard_size, progress)
    return plan


def _refuse_wide(model: nn.Module) -> None:
    state = fused_state(model)
    for attention in () if state is None else state.recipe.attentions.values():
        raise CheckpointError(
            f"the nemotron-nas layout has one number of heads for all layers, and layers {sorted(attention.layers)} "
            "became one attention with more (mixers: wide): save with format='canonical', or fuse with mixers: hoist"
        )


def _plan(model: nn.Module, max_shard_size: int | str, check: bool) -> tuple[ExportPlan, Layout]:
    bare = bare_model(model)
    _refuse_wide(bare)
    layout = Layout.of(bare)
    proof = prove(bare, layout) if check else "not checked"
    config = layout.config.to_diff_dict()
    config["torch_dtype"] = config["dtype"]  # what engines with an older transformers read
    facts = [piece.facts for piece in layout.pieces]
    shards = ShardLayout.of(facts, max_shard_size)
    return ExportPlan(config, facts, shards, engines_that_load(config), proof), layout


def engines_that_load(config: DeciLMConfig | Mapping[str, Any]) -> dict[str, str | None]:
    """For each engine None where it loads a folder with this configuration, else why not, by the rules of its own
    loader; an engine that no test runs is "not tested".

    Raises `ValueError` where the configuration contradicts itself.
    """
    read = (
        config if isinstance(config, DeciLMConfig) else DeciLMConfig(**copy.deepcopy(dict(config)))
    )  # its parts are kept and written to
    reasons: dict[str, list[str | None]] = {
        "transformers": [],
        "vllm": [_no_first_attention(read), _unequal_groups(read)],
        "mlx-lm": [_no_attention(read), _other_head_dim(read), _other_rope(read)],
        "llama.cpp": ["not tested: format gguf is for it"],
        "tensorrt-llm": ["not tested"],
    }
    return {engine: next(filter(None, [read.unsupported(), *found]), None) for engine, found in reasons.items()}


def _blocks(config: DeciLMConfig) -> list[Any]:
    return config.block_configs or []


def _no_attention(config: DeciLMConfig) -> str | None:
    return "no layer has attention" if all(block.attention.no_op for block in _blocks(config)) else None


def _no_first_attention(config: DeciLMConfig) -> str | None:
    return "the first layer has no attention" if _blocks(config)[0].attention.no_op else None


def _unequal_groups(config: DeciLMConfig) -> str | None:
    groups = {block.attention.n_heads_in_group for block in _blocks(config) if not block.attention.no_op}
    return f"n_heads_in_group differs between layers: {sorted(groups)}" if len(groups) > 1 else None


def _other_head_dim(config: DeciLMConfig) -> str | None:
    usual = config.hidden_size / config.num_attention_heads
    return f"head_dim is {config.head_dim}, not hidden / heads = {usual:g}" if config.head_dim != usual else None


def _other_rope(config: DeciLMConfig) -> str | None:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind in _SCALED_BY_MLX else f"its rotary embedding has no rope_type {kind!r}"
