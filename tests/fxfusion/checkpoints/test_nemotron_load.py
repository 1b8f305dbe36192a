"""Folders are read without running their code: ours, published ones, and those that nobody should trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxfusion.checkpoints.nemotron_nas.export import save
from fxfusion.checkpoints.nemotron_nas.load import load
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints.nemotron_models import fused_decoder, logits, off, settings
from tests.fxfusion.checkpoints.test_nemotron_configuration import block
from tests.fxfusion.checkpoints.test_nemotron_modeling import BLOCKS, mixed


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; `...` removes one."""
    file = folder / "config.json"
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(fused_decoder(), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """As published files spell it: nulls, padding, the old spelling of the rotary embedding, code of others."""
    model = mixed(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    target = tmp_path / "published"
    target.mkdir()
    save_file(model.state_dict(), target / "model.safetensors", {"format": "pt"})
    config = settings(num_hidden_layers=len(BLOCKS), block_configs=BLOCKS) | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "attention_bias": False,
        "hidden_act": "silu",
        "intermediate_size": None,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.45.1",
        "use_cache": True,
    }
    (target / "config.json").write_text(json.dumps(config))
    (target / "configuration_decilm.py").write_text("raise SystemExit('this code was run')\n")
    return target


def test_a_published_folder(published: Path) -> None:
    loaded = load(published)
    assert torch.equal(logits(loaded), logits(mixed(rope_parameters={"rope_type": "default", "rope_theta": 5e5})))
    assert off(logits(loaded), logits(mixed())) > 1e-3, "rope_theta was read"
    assert (loaded.config.num_key_value_heads, loaded.config.intermediate_size) == (2, 768)
    assert not loaded.training and not hasattr(loaded.config, "auto_map")


def test_it_is_written_again_without_its_padding(published: Path, tmp_path: Path) -> None:
    loaded = load(published)
    plan = save(loaded, tmp_path / "again")
    assert plan.config["num_hidden_layers"] == 5 and None not in plan.config["block_configs"]
    assert (plan.config["intermediate_size"], plan.config["num_key_value_heads"]) == (768, 2)
    assert off(logits(load(tmp_path / "again")), logits(loaded)) < 1e-5


def test_the_way_there_and_back_changes_nothing(folder: Path, tmp_path: Path) -> None:
    save(load(folder), tmp_path / "again")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / file).read_text()) == json.loads((folder / file).read_text())
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dtype_and_device(folder: Path) -> None:
    assert load(folder).dtype == torch.float32
    loaded = load(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    edit(folder, dtype=..., torch_dtype=...)
    assert load(folder).dtype == torch.float32
    edit(folder, dtype="float16")
    assert load(folder).dtype == torch.float16
    assert all(value.is_meta for value in load(folder, device="meta").parameters())


def test_progress_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder, progress=True)
    assert "Reading" in capsys.readouterr().err
    load(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, r"config.json is of the model_type 'llama', not 'nemotron-nas'"),
        ({"model_type": ...}, "model_type None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised model"),
        ({"block_configs": ...}, "block_configs has 0 entries"),
        ({"block_configs": 7}, "config.json is not valid"),
        ({"num_hidden_layers": 3}, "block_configs has 4 entries for num_hidden_layers = 3"),
        ({"num_hidden_layers": "4"}, "config.json is not valid.*num_hidden_layers"),
        ({"hidden_size": 128}, r"model.embed_tokens.weight is \[101, 64\], the model's is \[101, 128\]"),
        ({"hidden_size": 2**40}, "model.embed_tokens.weight is|cannot be built"),
        ({"vocab_size": 2**62}, "model.embed_tokens.weight is|cannot be built"),
        ({"vocab_size": -5}, "cannot be built"),
        ({"hidden_act": "no_such"}, "cannot be built: .*no_such"),
        ({"num_attention_heads": 0}, "config.json is not valid"),
        ({"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": 3}, "config.json is not valid"),
        ({"rope_scaling": {"rope_type": "none_such"}}, "cannot be built|is not valid"),
        ({"block_configs": [block(2, 6.0)] * 4}, "layers.2.input_layernorm.weight"),
        (
            {"block_configs": [*[block(2, 6.0)] * 3, block(2, 6.0, attention__replace_with_linear=True)]},
            r"config.json is not valid: block_configs\[3\].attention.replace_with_linear = True is not supported",
        ),
        (
            {"block_configs": [*[block(2, 6.0)] * 3, block(2, 6.0, ffn__sparsify=["a"])]},
            r"block_configs\[3\].ffn.sparsify",
        ),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any], reason: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=reason):
        load(folder)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def lost(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def renamed(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found["model.layers.3.mlp.gate.weight"] = found.pop("model.layers.3.mlp.gate_proj.weight")
    save_file(found, folder / "model.safetensors")


def whole_numbers(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found["model.norm.weight"] = found["model.norm.weight"].long()
    save_file(found, folder / "model.safetensors")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"num_beams": ')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "model.safetensors"),
        (lost, "has neither model.safetensors nor"),
        (renamed, "lacks the tensor model.layers.3.mlp.gate_proj.weight; it has model.layers.3.mlp.gate.weight"),
        (whole_numbers, "model.norm.weight is torch.int64"),
        (no_config, "config.json is missing"),
        (bad_generation, "generation_config.json cannot be read as JSON"),
    ],
)
def test_a_damaged_folder(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=reason):
        load(folder)


def test_memory_is_not_taken_for_what_the_config_claims(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of the rotary embedding are the only memory besides the files' tensors; they come after the check."""
    monkeypatch.setattr("fxfusion.checkpoints.nemotron_nas.load.give_angles", lambda *_: pytest.fail("too early"))
    edit(folder, head_dim=2**33)
    with pytest.raises(CheckpointError, match="q_proj"):
        load(folder)
