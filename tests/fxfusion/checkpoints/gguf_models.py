"""Tiny GGUF files of random Llamas, written by the package `gguf` as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

LAYERS, HIDDEN, WIDTH, HEADS, KV_HEADS = 2, 32, 64, 2, 1
_MERGED = ["Ġ1", "Ġ2"]
TOKENS = ["<eos>", *bytes_to_unicode().values(), *_MERGED]


@lru_cache
def llama(tied: bool = False, layers: int = LAYERS) -> Any:
    """The model that the files hold; not to be changed."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else 0.2 * torch.randn_like(weight))
    return model


def settings(layers: int = LAYERS) -> dict[str, Any]:
    """Of the model; floats are written as float32."""
    return {
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(TOKENS),
    }


def tokenizer_settings() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] + [1] * (len(TOKENS) - 1),
        "tokenizer.ggml.merges": [f"{merged[0]} {merged[1]}" for merged in _MERGED],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
    }


def write_gguf(
    path: Path,
    kind: str = "F32",
    *,
    tied: bool = False,
    layers: int = LAYERS,
    architecture: str = "llama",
    tokenizer: bool = True,
    change: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    leave_out: str = "",
) -> dict[str, Tensor]:
    """Write a file, its matrices as `kind`; returns the values that a reader finds, by the model's names.

    `change`: settings that are others, or None for no such setting. `tensors`: more of them. `leave_out`: one by its
    name in the file.
    """
    writer = gguf.GGUFWriter(path, architecture)
    known = {**settings(layers), **(tokenizer_settings() if tokenizer else {}), **(change or {})}
    for name, value in known.items():
        if value is not None:
            add(writer, name, value)
    found = {}
    for name, weight in llama(tied, layers).state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored, found[name] = _stored(weight, kind if weight.dim() > 1 else "F32")
        which = gguf.GGMLQuantizationType[kind if weight.dim() > 1 else "F32"]
        if name_of(name) != leave_out:
            data = _permuted(stored, name)
            writer.add_tensor(name_of(name), data, raw_dtype=which)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """A setting of the type that the converter uses."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(name, value)  # type: ignore[operator]


def name_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`"""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 16)
    found = names.get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    return found


def _stored(weight: Tensor, kind: str) -> tuple[np.ndarray[Any, Any], Tensor]:
    """What the file holds, and the floats that it stands for."""
    which = gguf.GGMLQuantizationType[kind]
    stored = gguf.quantize(weight.numpy(), which)
    return stored, torch.from_numpy(gguf.dequantize(stored, which).copy()).reshape(weight.shape)


def _permuted(rows: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Queries and keys in the order of llama.cpp's rotary embedding: pairs, not halves."""
    heads = HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else 0
    if not heads:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
