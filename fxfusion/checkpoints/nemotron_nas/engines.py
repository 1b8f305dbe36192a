"""Which engines can load a nemotron-nas folder, from its configuration alone.

Read off the engines' own loaders; docs and model cards say which were also run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig

_SCALED_BY_MLX = ("default", "linear", "llama3", "yarn", "longrope")
_SCALED_BY_LLAMA_CPP = ("default", "linear", "llama3")
_BYTE_PAIR_VOCABULARY = 128256  # what llama.cpp's converter takes for this tokenizer, any other for SentencePiece


def engines_that_load(config: DeciLMConfig | Mapping[str, Any]) -> dict[str, str | None]:
    """For each engine None where it can load a folder with this configuration, else why not.

    Raises `ValueError` where the configuration contradicts itself.
    """
    read = (
        config if isinstance(config, DeciLMConfig) else DeciLMConfig(**copy.deepcopy(dict(config)))
    )  # its parts are kept and written to
    checks = {
        "transformers": [read.unsupported()],
        "vllm": _vllm(read),
        "mlx-lm": _mlx(read),
        "llama.cpp": _llama_cpp(read),
        "tensorrt-llm": _tensorrt(read),
    }
    return {engine: next((reason for reason in reasons if reason), None) for engine, reasons in checks.items()}


def _vllm(config: DeciLMConfig) -> list[str | None]:
    return [config.unsupported(), _no_first_attention(config), _unequal_groups(config)]


def _mlx(config: DeciLMConfig) -> list[str | None]:
    has_none = all(block.attention.no_op for block in _blocks(config))
    return [
        config.unsupported(),
        "no layer has attention" if has_none else None,
        _other_head_dim(config),
        _other_rope(config, _SCALED_BY_MLX),
    ]


def _llama_cpp(config: DeciLMConfig) -> list[str | None]:
    blocks = _blocks(config)
    alone = [layer for layer, block in enumerate(blocks) if block.ffn.no_op and not block.attention.no_op]
    other = config.vocab_size != _BYTE_PAIR_VOCABULARY
    return [
        config.unsupported(),
        f"layer {alone[0]} has attention and no FFN, and the engine would skip both" if alone else None,
        "the last layer is padding" if blocks[-1].attention.no_op and blocks[-1].ffn.no_op else None,
        "the converter reads the first layer's ffn_mult" if blocks[0].ffn.no_op else None,
        _other_head_dim(config),
        _other_rope(config, _SCALED_BY_LLAMA_CPP),
        "biases were never tried there" if config.attention_bias or config.mlp_bias else None,
        f"with {config.vocab_size} tokens the converter expects a SentencePiece tokenizer" if other else None,
    ]


def _tensorrt(config: DeciLMConfig) -> list[str | None]:
    has_bias = config.attention_bias or config.mlp_bias
    return [config.unsupported(), "it has no biases" if has_bias else None]


def _blocks(config: DeciLMConfig) -> list[Any]:
    return config.block_configs or []


def _no_first_attention(config: DeciLMConfig) -> str | None:
    return "the first layer has no attention" if _blocks(config)[0].attention.no_op else None


def _unequal_groups(config: DeciLMConfig) -> str | None:
    groups = {block.attention.n_heads_in_group for block in _blocks(config) if not block.attention.no_op}
    return f"n_heads_in_group differs between layers: {sorted(groups)}" if len(groups) > 1 else None


def _other_head_dim(config: DeciLMConfig) -> str | None:
    usual = config.hidden_size / config.num_attention_heads
    return f"head_dim is {config.head_dim}, not hidden / heads = {usual:g}" if config.head_dim != usual else None


def _other_rope(config: DeciLMConfig, known: tuple[str, ...]) -> str | None:
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind in known else f"its rotary embedding has no rope_type {kind!r}"
