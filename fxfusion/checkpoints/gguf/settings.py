"""Settings of a GGUF file against the config that transformers makes of it: one that it leaves out changes the model.

    llama.rope.scaling.factor = 8.0     and no rope_parameters["factor"] in the config: an error, not another model

A setting is proved by the tensors' shapes, says nothing of what is computed, or stands in the config by one of the
names below. Any other is refused by its name.
Source: class `Keys` of gguf/constants.py, and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fxfusion.errors import CheckpointError

# What shapes prove, or what only describes. A name that ends in a dot stands for all that begin with it.
_PROVED = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "nextn_predict_layers"),
    *("expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length", "ssm.", "shortconv."),
    *("rope.dimension_sections", "rope.scaling.finetuned", "tensor_data_layout"),
)
_EPSILON = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
# By what names a config may have it. `rope.` before a name: inside of `rope_parameters`.
_NAMES = {
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "n_head"),
    "attention.key_length": ("head_dim", "global_head_dim"),
    "attention.value_length": ("head_dim", "global_head_dim"),
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.layer_norm_epsilon": _EPSILON,
    "attention.sliding_window": ("sliding_window",),
    "attention.causal": ("is_causal",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "expert_used_count": ("num_experts_per_tok",),
    "full_attention_interval": ("full_attention_interval",),
    "use_parallel_residual": ("use_parallel_residual",),
    "rope.dimension_count": ("rotary",),
    "rope.freq_base": ("rope.rope_theta", "rope_theta"),
    "rope.scaling.type": ("rope.rope_type",),
    "rope.scaling.factor": ("rope.factor",),
    "rope.scaling.original_context_length": (
        "rope.original_max_position_embeddings",
        "original_max_position_embeddings",
    ),
    "rope.scaling.attn_factor": ("rope.attention_factor",),
    "rope.scaling.yarn_beta_fast": ("rope.beta_fast",),
    "rope.scaling.yarn_beta_slow": ("rope.beta_slow",),
}
_SAME_WORDS = {"none": "default"}


def check_settings(path: Path, architecture: str, metadata: Mapping[str, Any], config: Any) -> None:
    """Raises `CheckpointError` that names a setting of the file that the config does not repeat."""
    text = config.get_text_config(decoder=True)
    for name, value in metadata.items():
        setting = name.removeprefix(f"{architecture}.")
        if setting == name or any(setting == one or one[-1] == "." and setting.startswith(one) for one in _PROVED):
            continue
        known = dict(_values(text, _NAMES.get(setting, ())))
        if any(_same(value, found) for found in known.values()):
            continue
        shown = ", ".join(f"{one} {found!r}" for one, found in known.items()) or "nothing that says so"
        raise CheckpointError(
            f"{path}: {name} is {value!r}, and the config that transformers makes of it has {shown}: it would be "
            "another model; give the folder of the model that the file was made from"
        )


def _values(config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a config has by these names."""
    rope = getattr(config, "rope_parameters", None) or {}
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    for name in names:
        if name == "head_dim":
            yield name, size
        elif name == "rotary" and size is not None:
            yield "a rotary part", round(size * (rope.get("partial_rotary_factor") or 1.0))
        elif name.startswith("rope."):
            inner = name.removeprefix("rope.")
            for part in (rope, *(one for one in rope.values() if isinstance(one, dict))):
                if part.get(inner) is not None:
                    yield f"{inner} of rope_parameters", part[inner]
        elif getattr(config, name, None) is not None:
            yield name, getattr(config, name)


def _same(value: Any, found: Any) -> bool:
    """Whether a setting is what the config has; of one number for each layer, the layers without any (0) aside."""
    if isinstance(value, list):
        return all(_same(one, found) for one in value if one)
    if isinstance(value, float) or isinstance(found, float):
        numbers = isinstance(found, (int, float)) and isinstance(value, (int, float))
        return numbers and math.isclose(value, found, rel_tol=1e-6)
    return bool(_SAME_WORDS.get(value, value) == found if isinstance(value, str) else value == found)
