"""Decoders without weights from the layer tables of `fxfusion.cost`, to explain, plan and export dry.

decoder_of(LayerTable.published("nemotron-super-49b"))                       80 layers, 31 of them without attention
decoder_of(LayerTable.published("llama-3.1-405b"), without_attention=...)    126 layers, as the Ultra model had them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import WIDTH_MULTIPLE, DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.layout import AUTO_MAP
from fxfusion.checkpoints.nemotron_nas.load import note_missing_attention
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.checkpoints.nemotron_nas.proof import empty_decoder, finish, put
from fxfusion.cost.layer_table import LayerTable
from fxfusion.errors import OptionError

_SPAN = re.compile(r"(\d+)-(\d+)")
# What tables leave out, as the published models of this kind have it.
_SETTINGS = {
    "bos_token_id": 128000,
    "dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def decoder_of(
    table: LayerTable, *, without_attention: Iterable[int] = (), settings: Mapping[str, Any] | None = None
) -> DeciLMForCausalLM:
    """A bfloat16 decoder on the meta device, with the layers of a table.

    Args:
        table: of a model with gated FFNs whose widths are multiples of 256, its layers numbered as given.
        without_attention: layers that have attention in the table and none here.
        settings: further entries of the configuration, such as `rope_parameters`.

    Raises:
        OptionError: the table says too little, or something that this layout cannot hold.
    """
    heads, kv_heads, vocabulary = table.num_attention_heads, table.num_key_value_heads, table.vocab_size
    if heads is None or kv_heads is None or vocabulary is None or not table.gated:
        raise OptionError(f"{table.name}: heads, key-value heads, vocab_size and gated FFNs are needed for a decoder")
    gone = set(without_attention)
    if unknown := gone - set(range(len(table.layers))):
        raise OptionError(f"{table.name}: there is no layer {min(unknown)}")
    widths = [layer.ffn_width or 0 for layer in table.layers]
    if odd := [width for width in widths if width % WIDTH_MULTIPLE]:
        raise OptionError(f"{table.name}: the FFN width {odd[0]} is no multiple of {WIDTH_MULTIPLE}")
    blocks = [
        _block(heads // kv_heads if layer.has_mixer and number not in gone else None, width / table.hidden_size)
        for number, (layer, width) in enumerate(zip(table.layers, widths, strict=True))
    ]
    config = DeciLMConfig(
        **{
            **_SETTINGS,
            "architectures": ["DeciLMForCausalLM"],
            "auto_map": dict(AUTO_MAP),
            "block_configs": blocks,
            "hidden_size": table.hidden_size,
            "num_attention_heads": heads,
            "num_hidden_layers": len(blocks),
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": table.tie_word_embeddings,
            "vocab_size": vocabulary,
            **(settings or {}),
        }
    )
    decoder = empty_decoder(note_missing_attention(config))
    for name, value in list(decoder.named_parameters()):
        put(decoder, name, value.to(config.dtype))
    return finish(decoder)


def without_attention_before_fusion(table: LayerTable) -> tuple[int, ...]:
    """Layers without attention, numbered as before FFNs were fused: padding left out, fused slots counted in full.

    Raises `OptionError` where a fused slot does not say of which layers it was made.
    """
    found: list[int] = []
    number = 0
    for slot, layer in enumerate(table.layers):
        if layer.ffn_width is None and not layer.has_mixer:
            continue
        count = 1
        if slot in table.fused_slots:
            span = _SPAN.search(table.fused_slots[slot])
            if span is None or int(span[1]) != number:
                raise OptionError(
                    f"{table.name}: slot {slot} does not begin at layer {number}: {table.fused_slots[slot]}"
                )
            count = int(span[2]) - int(span[1]) + 1
        if not layer.has_mixer:
            found += range(number, number + count)
        number += count
    return tuple(found)


def _block(group: int | None, ratio: float) -> dict[str, Any]:
    return {
        "attention": {"n_heads_in_group": group, "no_op": group is None},
        "ffn": {"ffn_mult": 1.5 * ratio or None, "no_op": not ratio},
    }
