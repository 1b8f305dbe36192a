"""Rotary embeddings in llama.cpp's words give the angles that transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fxfusion.checkpoints.llama_cpp.export import save
from fxfusion.checkpoints.llama_cpp.rope import Rope
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints import gguf_eager
from tests.fxfusion.checkpoints.nemotron_models import decoder, ids, logits, off

_BASE = {"rope_theta": 5e5}
_REACH = {"original_max_position_embeddings": 64, "factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {**_REACH, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": _REACH,
}


def turned(kind: str, **more: Any) -> Any:
    rope = {**_BASE, "rope_type": kind, **KINDS.get(kind, {}), **more}
    return decoder(num_hidden_layers=2, head_dim=64, rope_parameters=rope, max_position_embeddings=256)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no tokenizer is written")
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_angles_of_the_model(kind: str, tmp_path: Path) -> None:
    model, file, tokens = turned(kind), tmp_path / "model.gguf", ids(tokens=100)
    save(model, file)
    assert off(gguf_eager.logits(file, tokens), logits(model, tokens)) < 1e-4
    if kind != "default":
        plain = logits(turned("default"), tokens)
        assert off(gguf_eager.logits(file, tokens), plain) > 1e-2, "the angles matter"
    assert ("rope_freqs.weight" in gguf_eager.contents(file)[1]) == (kind == "llama3")


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("dynamic", {"factor": 2.0}, "no rotary embedding of rope_type 'dynamic'"),
        ("yarn", {"mscale": 0.7}, "no such rotary setting: mscale = 0.7"),
        ("yarn", {"truncate": False}, "no such rotary setting: truncate = False"),
        ("yarn", {"attention_factor": 1.5}, r"multiplies by 1.139, and the model by 1.5 \(attention_factor\)"),
    ],
)
def test_what_llama_cpp_does_not_compute(kind: str, more: dict[str, Any], why: str) -> None:
    model = turned("default")
    model.config.rope_parameters = {**_BASE, "rope_type": kind, **KINDS.get(kind, {}), **more}
    with pytest.raises(CheckpointError, match=why):
        Rope.of(model, model.config, 64)


def test_angles_that_are_not_those_of_the_config_are_refused() -> None:
    model = turned("linear")
    Rope.of(model, model.config, 64)
    Rope.of(model.bfloat16(), model.config, 64)  # rounded with the weights
    model = turned("linear")
    with torch.no_grad():
        model.model.rotary_emb.inv_freq[31] *= 1.01
    with pytest.raises(CheckpointError, match="inv_freq is not what llama.cpp computes for rope_type 'linear'"):
        Rope.of(model, model.config, 64)
