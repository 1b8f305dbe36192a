"""Folders whose config lists its layers: read without their code, fused, and written in other forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxfusion
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints import gguf_eager
from tests.fxfusion.checkpoints import listed_folders as others
from tests.fxfusion.checkpoints.nemotron_models import ids, logits, off

KINDS: dict[str, tuple[Callable[[], dict[str, Any]], Any, bool]] = {
    "nemotron-nas": (others.nemotron, others.LAYERS, False),
    "anymodel": (others.anymodel, others.ODD, True),
    "null": (lambda: others.anymodel(null=True), others.ODD, False),
    "per_layer_config": (others.per_layer, others.ODD, False),
}


def written(tmp_path: Path, kind: str) -> tuple[Path, Any]:
    config, layers, subblocks = KINDS[kind]
    return others.write(tmp_path / kind, config(), others.tensors(layers), subblocks=subblocks), layers


@pytest.mark.slow  # layers are taken out of captured graphs
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_its_config_says(kind: str, tmp_path: Path) -> None:
    folder, layers = written(tmp_path, kind)
    model = fxfusion.from_pretrained(folder)
    expected = others.eager(layers, others.tensors(layers), ids())
    assert off(logits(model), expected) < 1e-5
    wrong = [one._replace(kv_heads=0) if number == 7 else one for number, one in enumerate(layers)]
    assert off(logits(model), others.eager(wrong, others.tensors(layers), ids())) > 1e-2
    generated = model.generate(ids()[:1, :5], max_new_tokens=4, do_sample=False)
    again = ids()[:1, :5]
    for _ in range(4):
        again = torch.cat([again, others.eager(layers, others.tensors(layers), again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, again)


@pytest.fixture(scope="module")
def anymodel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("anymodel"), "anymodel")[0]


EQUAL = tuple(one._replace(kv_heads=min(one.kv_heads, 2) and 2) for one in others.ODD)
"""One number of key-value heads, as engines for DeciLM models need it."""
PLAN = {"groups": [[1, 2, 3, 4]], "norm": "last"}


def parallel(layers: Any, values: dict[str, Any], members: range) -> tuple[Any, dict[str, Any]]:
    """Layers and tensors with these FFNs as one, by hand, under the last one's norm; the others are gone."""
    first, last = members[0], members[-1]
    kept = [number for number in range(len(layers)) if number not in members[1:]]
    found = {}
    for name, value in values.items():
        head, _, rest = name.partition("model.layers.")
        number, _, leaf = rest.partition(".")
        if not rest or int(number) not in members:
            place = str(kept.index(int(number))) if rest else ""
            found[f"{head}model.layers.{place}.{leaf}" if rest else name] = value
    prefix = f"model.layers.{kept.index(first)}."
    found[f"{prefix}post_attention_layernorm.weight"] = values[f"model.layers.{last}.post_attention_layernorm.weight"]
    for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
        parts = [values[f"model.layers.{number}.mlp.{role}_proj.weight"] for number in members]
        found[f"{prefix}mlp.{role}_proj.weight"] = torch.cat(parts, axis)
    wide = layers[first]._replace(width=sum(layers[number].width for number in members))
    return [wide if number == first else layers[number] for number in kept], found


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nemotron-nas", "transformers", "anymodel", "gguf"])
def test_fused_and_written_in_each_form(format: Any, tmp_path: Path) -> None:
    """From Model-Optimizer's schema to each of ours and back, against the equations of the fused model."""
    values = others.tensors(EQUAL)
    folder = others.write(tmp_path / "model", others.anymodel(EQUAL), values, subblocks=True)
    model = fxfusion.fuse(fxfusion.from_pretrained(folder), PLAN)
    expected = others.eager(*parallel(EQUAL, values, range(1, 5)), ids())
    assert off(logits(model), expected) < 1e-5
    assert off(logits(model), others.eager(EQUAL, values, ids())) > 1e-3
    output = tmp_path / ("out.gguf" if format == "gguf" else "out")
    fxfusion.save_pretrained(model, output, format)
    if format == "gguf":
        assert off(gguf_eager.logits(output, ids()), expected) < 2e-5
        return
    again = fxfusion.from_pretrained(output)
    assert off(logits(again), expected) < 1e-5
    with pytest.raises(CheckpointError, match="no canonical form"):
        fxfusion.save_pretrained(again, tmp_path / "canonical")


@pytest.mark.slow
def test_the_newer_schema_is_written_with_its_own_keys(anymodel: Path, tmp_path: Path) -> None:
    """What was read is written again: the same blocks, by the same names, and the tensors bit for bit."""
    fxfusion.save_pretrained(fxfusion.from_pretrained(anymodel), tmp_path / "again", "anymodel")
    blocks = json.loads((tmp_path / "again" / "config.json").read_text())["block_configs"]
    kept = {"attention": ("no_op", "num_key_value_heads"), "ffn": ("no_op", "intermediate_size")}
    given = others.anymodel()["block_configs"]
    for one, other in zip(blocks, given, strict=True):
        for part, names in kept.items():
            assert [one[part][name] for name in names] == [other[part][name] for name in names]
            assert one[part].keys() <= other[part].keys()
    stored, values = load_file(tmp_path / "again" / "model.safetensors"), others.tensors(others.ODD)
    assert stored.keys() == values.keys() and all(torch.equal(stored[name], values[name]) for name in values)


@pytest.mark.slow
def test_from_the_older_schema_to_the_newer(tmp_path: Path) -> None:
    folder, layers = written(tmp_path, "nemotron-nas")
    fxfusion.save_pretrained(fxfusion.from_pretrained(folder), tmp_path / "newer", "anymodel")
    config = json.loads((tmp_path / "newer" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == [
        one.width or None for one in layers
    ]
    again = fxfusion.from_pretrained(tmp_path / "newer")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert off(logits(again), others.eager(layers, others.tensors(layers), ids())) < 1e-5


@pytest.mark.slow  # the last one is built
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_configs": 7}, "config.json: block_configs: expected a list"),
        ({"model_type": "no_such"}, "transformers has no model_type 'no_such'"),
        ({"num_hidden_layers": 4}, "block_configs has 9 entries for num_hidden_layers = 4"),
        ({"hidden_size": 32}, "lm_head|embed_tokens|q_proj|is \\["),
    ],
)
def test_a_config_that_does_not_fit(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = others.anymodel() | changes
    folder = others.write(tmp_path / "model", config, others.tensors(others.ODD))
    with pytest.raises(CheckpointError, match=reason):
        fxfusion.from_pretrained(folder)


def test_members_that_are_not_kept(anymodel: Path) -> None:
    with pytest.raises(CheckpointError, match="keeps no members"):
        fxfusion.from_pretrained(anymodel, fused=False)
    with pytest.raises(CheckpointError, match="no shards"):
        fxfusion.from_pretrained(anymodel, shards=2)


@pytest.mark.slow
def test_a_tensor_too_much(tmp_path: Path) -> None:
    """An attention that the config leaves out must not be there."""
    values = others.tensors(others.ODD)
    folder = others.write(tmp_path / "model", others.anymodel(), values)
    extra = "model.layers.3.input_layernorm.weight"
    save_file(values | {extra: torch.ones(others.HIDDEN)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{extra} is no tensor of the model"):
        fxfusion.from_pretrained(folder)


def test_files_lie_in_the_folder_or_in_its_one_inside(tmp_path: Path) -> None:
    folder = others.write(tmp_path / "m", others.anymodel(), others.tensors(others.ODD), subblocks=True)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    for bad in ("../subblocks_safetensors", "other", "subblocks_safetensors/.."):
        index.write_text(text.replace("subblocks_safetensors/lm_head", f"{bad}/lm_head"))
        with pytest.raises(CheckpointError, match="is not one in the folder"):
            fxfusion.from_pretrained(folder)
