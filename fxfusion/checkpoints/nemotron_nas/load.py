"""Read a nemotron-nas folder, ours or a published one, without running any code that lies in it.

config.json -> `DeciLMConfig` -> decoder without memory -> names and shapes compared with the files -> values
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fxfusion.checkpoints.canonical_load import CONFIG, handed_out, read_generation_config
from fxfusion.checkpoints.nemotron_nas.configuration_decilm import WIDTH_MULTIPLE, Block, DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.checkpoints.nemotron_nas.proof import empty_decoder, finish, give_angles, put
from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder
from fxfusion.checkpoints.shards import TensorFacts
from fxfusion.cost.layer_forms import LayerForm, layer_forms
from fxfusion.errors import CheckpointError
from fxfusion.models.drop_record import note_as_loaded
from fxfusion.report.progress import reporting

MODEL_TYPE = "nemotron-nas"
# Settings that name code or devices of the machine where the folder was written.
_NOT_OURS = ("auto_map", "attn_implementation", "fxfusion", "kv_sharing_modes", "use_flash_attention_2")


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> DeciLMForCausalLM:
    """The model of a folder, in eval mode. Names, shapes and sizes are checked before memory is taken for them.

    Args:
        directory: a folder with config.json and safetensors files. Published folders may say null for
            `intermediate_size` and `num_key_value_heads`, and have layers that are padding.
        dtype: of the parameters; None means the config's, or that of the files.
        device: where they go.
        progress: say how far it is, on the error stream.

    Raises:
        CheckpointError: that names file, tensor or setting.
    """
    reader = CheckpointReader.open(directory)
    config, generation = read_config(reader.folder), read_generation_config(reader.folder)
    with _naming(reader.folder, "cannot be built"):
        decoder = empty_decoder(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    named = dict(decoder.named_parameters(remove_duplicate=False))
    expected = [TensorFacts.of(name, value) for name, value in named.items() if name not in tied]
    reader.check(expected, optional=tied)
    give_angles(decoder, device)
    wanted = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else None)
    size = sum(reader.stored[facts.name].nbytes for facts in expected)
    with reporting(progress, "Reading", size, is_bytes=True) as advance:
        for facts in expected:
            value = reader.read(facts.name)
            advance(value.nbytes)
            put(decoder, facts.name, torch.nn.Parameter(value.to(device=device, dtype=wanted)))
    decoder.config.dtype = decoder.dtype
    loaded: DeciLMForCausalLM = handed_out(finish(decoder), directory, generation)
    return loaded


def outline_of(folder: SafeFolder, config: DeciLMConfig | None = None) -> DeciLMForCausalLM:
    """The model of a folder without weights, from its config alone, on the meta device."""
    with _naming(folder, "cannot be built"):
        return empty_decoder(config or read_config(folder))


def read_config(folder: SafeFolder) -> DeciLMConfig:
    """The configuration of a folder. Raises `CheckpointError` that names the setting."""
    return config_from(folder.json(CONFIG), folder)


def config_from(found: Mapping[str, Any], folder: SafeFolder, file: str = CONFIG) -> DeciLMConfig:
    """The configuration of these settings, out of a file of a folder. Raises `CheckpointError` that names both."""
    where = folder.path / file
    if found.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{where} is of the model_type {found.get('model_type')!r}, not {MODEL_TYPE!r}")
    if found.get("quantization_config") is not None:
        raise CheckpointError(f"{where} is of a quantised model (quantization_config), which is not read")
    settings = {name: value for name, value in found.items() if name not in _NOT_OURS and not name.startswith("_")}
    with _naming(folder, "is not valid", file):
        forms = layer_forms(settings) or ()
        blocks = [_block(form, settings) for form in forms]
        config = DeciLMConfig(**{**settings, "block_configs": blocks})
    return note_missing_attention(config)


def _block(form: LayerForm, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A layer in the words of `DeciLMConfig`, in whichever it was said."""
    width, kv_heads = (form.settings.get(name) for name in ("intermediate_size", "num_key_value_heads"))
    if width is not None and width % WIDTH_MULTIPLE:
        raise ValueError(
            f"block_configs[{form.place}].ffn.intermediate_size = {width} is no multiple of {WIDTH_MULTIPLE}"
        )
    group = None if kv_heads is None else settings["num_attention_heads"] // kv_heads
    mult = None if width is None else 1.5 * width / settings["hidden_size"]
    return {
        "attention": {"n_heads_in_group": group, "no_op": not form.attention},
        "ffn": {"ffn_mult": mult, "no_op": not form.ffn},
    }


def note_missing_attention(config: DeciLMConfig) -> DeciLMConfig:
    """Record the layers without attention as `drop_attention` would, so that more can be dropped."""
    blocks: list[Block] = config.block_configs or []
    missing = [layer for layer, block in enumerate(blocks) if block.attention.no_op]
    slots: list[int | None] = []
    for block in blocks:
        slots.append(None if block.attention.no_op else sum(slot is not None for slot in slots))
    if missing:
        config.fxfusion = {"dropped_attention": missing, "cache_slots": slots, "layer_types": None}
        note_as_loaded(config, missing)
    return config


@contextmanager
def _naming(folder: SafeFolder, what: str, name: str = CONFIG) -> Iterator[None]:
    """Whatever a class of transformers does not like about a file becomes an error that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder.path / name} {what}: {error.__cause__ or error}") from error
