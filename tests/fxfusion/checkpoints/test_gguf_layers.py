"""The layers of a GGUF file against its tensors, and in a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import fxfusion
from fxfusion.checkpoints.gguf.header import GgufFile
from fxfusion.checkpoints.gguf.layers import layers_of, rows_of
from fxfusion.checkpoints.llama_cpp.export import save
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints.nemotron_models import decoder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no tokenizer is written")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers: 2 without attention, 4 with an FFN of zeros of 32 channels. Not to be changed."""
    model = fxfusion.drop_attention(decoder(), [2])
    model.model.layers[4].mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=32))
    for weight in model.model.layers[4].mlp.parameters():
        weight.data.zero_()
    path = tmp_path_factory.mktemp("file") / "model.gguf"
    save(model, path)
    return path


def test_a_table_of_the_layers(file: Path) -> None:
    rows = rows_of(layers_of(GgufFile.read(file)))
    whole = (4, 2, "256")
    assert rows == [("0-1", *whole), ("2", 0, 0, "256"), ("3", *whole), ("4", 4, 2, "zero"), ("5", *whole)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("attention.head_count", [4, 4, 0, 4, 4], "has 5 numbers, for 6 layers"),
        ("attention.head_count", [4, 4, 4, 4, 4, 4], "layer 2 has 4 heads and 0 key-value heads"),
        (
            "attention.head_count",
            [4, 8, 0, 4, 4, 4],
            r"layer 1: blk.1.attn_q.weight is \[64, 64\], and should",
        ),
        ("attention.head_count_kv", [2, 2, 0, 2, 2, 3], "layer 5 has 4 heads and 3 key-value heads"),
        ("feed_forward_length", [256, 256, 256, 256, 0, 256], "layer 4 has attention and no FFN, and llama.cpp would"),
        ("feed_forward_length", [256, 256, 256, 512, 32, 256], r"layer 3: blk.3.ffn_gate.weight is \[256, 64\]"),
        ("block_count", 7, "numbers, for 7 layers"),
        ("block_count", 0, "block_count is 0"),
        ("embedding_length", None, "has no deci.embedding_length"),
    ],
)
def test_numbers_that_do_not_fit(file: Path, name: str, value: Any, why: str) -> None:
    found = GgufFile.read(file)
    changed = replace(found, metadata={**found.metadata, f"deci.{name}": value})
    with pytest.raises(CheckpointError, match=why):
        layers_of(changed)


def test_a_tensor_too_few_and_one_too_many(file: Path) -> None:
    found = GgufFile.read(file)
    fewer = tuple(one for one in found.tensors if one.name != "blk.3.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"layer 3: blk.3.ffn_up.weight is missing"):
        layers_of(replace(found, tensors=fewer))
    other = replace(found.tensors[-1], name="blk.2.attn_q.weight")
    with pytest.raises(CheckpointError, match=r"layer 2 has no place for blk.2.attn_q.weight"):
        layers_of(replace(found, tensors=(*found.tensors, other)))
