from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from fxfusion.checkpoints.gguf.settings import check_settings
from fxfusion.errors import CheckpointError

FILE = Path("a.gguf")


def llama(**fields: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaConfig(**{**sizes, **fields})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (llama(), {"llama.attention.head_count": 4, "llama.attention.head_count_kv": [2, 2], "llama.vocab_size": 7}),
        (
            llama(),
            {"llama.attention.key_length": 8, "llama.attention.value_length": 8, "llama.rope.dimension_count": 8},
        ),
        (llama(rms_norm_eps=1e-5), {"llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06}),
        (llama(), {"llama.rope.freq_base": 10000.0, "llama.rope.scaling.type": "none"}),
        (llama(rope_parameters=YARN), {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}),
        (llama(rope_parameters=YARN), {"llama.rope.scaling.original_context_length": 64}),
        (llama(), {"general.rope.scaling.factor": 3.0, "tokenizer.ggml.model": "gpt2", "llama.ssm.state_size": 3}),
    ],
)
def test_what_the_config_repeats_or_shapes_prove_passes(config: PreTrainedConfig, settings: dict[str, Any]) -> None:
    check_settings(FILE, "llama", settings, config)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"llama.attention.head_count": 8}, "num_attention_heads 4"),
        ({"llama.attention.head_count_kv": [2, 1]}, "num_key_value_heads 2"),
        ({"llama.attention.key_length": 16}, "head_dim 8"),
        ({"llama.rope.dimension_count": 4}, "a rotary part 8"),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-4}, "rms_norm_eps 1e-06"),
        ({"llama.rope.freq_base": 500000.0}, "rope_theta of rope_parameters 10000"),
        ({"llama.rope.scaling.type": "linear"}, "rope_type of rope_parameters 'default'"),
        ({"llama.rope.scaling.factor": 8.0}, "nothing that says so"),
        ({"llama.attention.sliding_window": 64}, "nothing that says so"),
        ({"llama.logit_scale": 0.5}, "nothing that says so"),
        ({"llama.what.is.this": 1}, "nothing that says so"),
    ],
)
def test_what_the_config_does_not_repeat_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_settings(FILE, "llama", settings, llama())
    (name,) = settings
    assert str(caught.value).startswith(f"a.gguf: {name} is ") and named in str(caught.value)
    assert "give the folder of the model" in str(caught.value)


def test_a_part_that_turns_is_compared_with_its_share_of_a_head() -> None:
    config = llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    check_settings(FILE, "llama", {"llama.rope.dimension_count": 4}, config)
    with pytest.raises(CheckpointError, match="a rotary part 4"):
        check_settings(FILE, "llama", {"llama.rope.dimension_count": 8}, config)
