"""Which engines load a folder, from its config alone."""

from __future__ import annotations

from typing import Any

import pytest

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.engines import engines_that_load
from tests.fxfusion.checkpoints.nemotron_models import settings
from tests.fxfusion.checkpoints.test_nemotron_configuration import block

ALL = ("transformers", "vllm", "mlx-lm", "llama.cpp", "tensorrt-llm")
FINE = [block(2, 6.0), block(None, 18.0), block(2, 6.0)]


def engines(blocks: list[dict[str, Any]], **others: Any) -> dict[str, str | None]:
    chosen = {"vocab_size": 128256, "num_hidden_layers": len(blocks), "block_configs": blocks, **others}
    return engines_that_load(DeciLMConfig(**settings(**chosen)))


def test_a_usual_folder_loads_everywhere() -> None:
    assert engines(FINE) == dict.fromkeys(ALL)


@pytest.mark.parametrize(
    ("blocks", "others", "refusing"),
    [
        ([block(None, 6.0), *FINE], {}, {"vllm": "the first layer has no attention"}),
        ([block(4, 6.0), *FINE], {}, {"vllm": r"n_heads_in_group differs between layers: [2, 4]"}),
        ([*FINE, block(2, None)], {}, {"llama.cpp": "layer 3 has attention and no FFN"}),
        ([*FINE, block(None, None)], {}, {"llama.cpp": "the last layer is padding"}),
        ([block(2, None), *FINE], {}, {"llama.cpp": "layer 0 has attention and no FFN"}),
        (FINE, {"vocab_size": 32000}, {"llama.cpp": "with 32000 tokens the converter expects a SentencePiece"}),
        (FINE, {"head_dim": 32}, {"mlx-lm": "head_dim is 32", "llama.cpp": "head_dim is 32"}),
        (FINE, {"attention_bias": True}, {"llama.cpp": "biases were never", "tensorrt-llm": "it has no biases"}),
        (FINE, {"mlp_bias": True}, {"llama.cpp": "biases were never", "tensorrt-llm": "it has no biases"}),
        (
            FINE,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {"mlx-lm": "no rope_type 'dynamic'", "llama.cpp": "no rope_type 'dynamic'"},
        ),
        ([*FINE, block(2, 6.0, ffn__replace_with_linear=True)], {}, dict.fromkeys(ALL, "replace_with_linear")),
    ],
)
def test_each_reason(blocks: list[dict[str, Any]], others: dict[str, Any], refusing: dict[str, str]) -> None:
    found = engines(blocks, **others)
    assert found.keys() == set(ALL)
    assert {engine for engine, reason in found.items() if reason is not None} == set(refusing)
    for engine, words in refusing.items():
        assert words in str(found[engine])


def test_the_content_of_a_file_is_not_changed() -> None:
    found = DeciLMConfig(**settings(num_hidden_layers=3, block_configs=FINE)).to_dict()
    before = repr(found)
    engines_that_load(found)
    assert repr(found) == before
