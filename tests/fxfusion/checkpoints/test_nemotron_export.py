"""A folder holds what the layout says, and computes what the model in memory does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.export import engines_that_load, plan_export, save
from fxfusion.checkpoints.nemotron_nas.load import load
from tests.fxfusion.checkpoints.nemotron_models import (
    HIDDEN,
    VOCABULARY,
    decoder,
    fused_by_hand,
    fused_decoder,
    ids,
    logits,
    off,
    randomised,
    settings,
    without_attention,
)
from tests.fxfusion.checkpoints.test_nemotron_configuration import block

ATTENTION_KEYS = {
    *("n_heads_in_group", "no_op", "num_sink_tokens", "replace_with_linear", "sparsify", "unshifted_sink"),
    *("use_prefill_window_in_sink_attention", "window_length"),
}
FFN_KEYS = {"ffn_mult", "no_op", "replace_with_linear", "sparsify"}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_the_tensors_are_those_of_the_layout(tmp_path: Path) -> None:
    save(fused_decoder(), tmp_path / "out")
    found = {name: list(value.shape) for name, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    expected = {"model.embed_tokens.weight": [101, 64], "model.norm.weight": [64], "lm_head.weight": [101, 64]}
    for layer, width in enumerate((256, 256, 768, 256)):
        prefix = f"model.layers.{layer}"
        if layer != 2:
            expected[f"{prefix}.input_layernorm.weight"] = [64]
            for role, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
                expected[f"{prefix}.self_attn.{role}_proj.weight"] = [rows, 64]
        expected[f"{prefix}.post_attention_layernorm.weight"] = [64]
        expected[f"{prefix}.mlp.gate_proj.weight"] = expected[f"{prefix}.mlp.up_proj.weight"] = [width, 64]
        expected[f"{prefix}.mlp.down_proj.weight"] = [64, width]
    assert found == expected


def test_the_config_has_every_key_that_engines_read(tmp_path: Path) -> None:
    save(fused_decoder(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), tmp_path / "out")
    config = config_of(tmp_path / "out")
    blocks = config.pop("block_configs")
    assert [set(block) for block in blocks] == [{"attention", "ffn"}] * 4
    assert all(set(block["attention"]) == ATTENTION_KEYS and set(block["ffn"]) == FFN_KEYS for block in blocks)
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [2, 2, None, 2]
    assert [block["attention"]["no_op"] for block in blocks] == [False, False, True, False]
    assert [block["ffn"]["ffn_mult"] for block in blocks] == [6.0, 6.0, 18.0, 6.0]
    wanted = {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": None,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 101,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert "kv_sharing_modes" not in config and "fxfusion" not in config
    # llama.cpp's converter asks whether the first one is a float.
    assert re.search(r'"ffn_mult": (\S+?),', (tmp_path / "out" / "config.json").read_text()).group(1) == "6.0"  # type: ignore[union-attr]


def test_scaled_rotary_embeddings_are_spelled_for_old_and_new_readers(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16}
    model = decoder(rope_parameters={**scaling, "rope_theta": 5e5})
    save(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {**scaling, "rope_theta": 5e5}
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5
    assert off(logits(load(tmp_path / "out")), logits(decoder())) > 1e-2, "the angles matter"


def test_the_folder_computes_what_the_model_does(tmp_path: Path) -> None:
    model = fused_decoder()
    plan = save(model, tmp_path / "out")
    assert plan.proof.startswith("logits of 14 tokens compared")
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


def test_one_wrong_weight_would_be_seen(tmp_path: Path) -> None:
    model = fused_decoder()
    save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    gate, up = "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"
    save_file({**tensors, gate: tensors[up], up: tensors[gate]}, file)
    assert off(logits(load(tmp_path / "out")), logits(model)) > 1e-2


def test_remote_code_of_the_folder_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = fused_decoder()
    save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert off(logits(loaded), logits(model)) < 1e-5
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.block_configs[2].attention.no_op and config.block_configs[2].ffn.ffn_mult == 18.0
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again), logits(loaded))
    assert {"rope_theta", "rope_scaling"} <= config_of(tmp_path / "again").keys()


def test_widths_are_filled_up_with_zeros(tmp_path: Path) -> None:
    model = decoder(intermediate_size=100)
    save(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        for role in ("gate_proj", "up_proj", "down_proj"):
            own, written = getattr(layer.mlp, role).weight, found[f"model.layers.{number}.mlp.{role}.weight"]
            assert sorted(written.shape) == [HIDDEN, 256]
            rows, columns = own.shape
            assert (
                torch.equal(written[:rows, :columns], own)
                and written.abs().sum() == written[:rows, :columns].abs().sum()
            )
    assert config_of(tmp_path / "out")["block_configs"][0]["ffn"]["ffn_mult"] == 6.0
    assert config_of(tmp_path / "out")["intermediate_size"] == 100, "the base model's own"
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


def test_unequal_widths_of_one_group(tmp_path: Path) -> None:
    model = decoder()
    for number, width in ((2, 40), (3, 300), (4, 256)):
        mlp = model.model.layers[number].mlp
        mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(HIDDEN, width, bias=False) for _ in range(2))
        mlp.down_proj = torch.nn.Linear(width, HIDDEN, bias=False)
    model = fused_by_hand(without_attention(randomised(model), (2, 3, 4)), (2, 3, 4))
    plan = save(model, tmp_path / "out")
    assert plan.config["block_configs"][2]["ffn"]["ffn_mult"] == 1.5 * 768 / HIDDEN  # 596 filled up
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    model = fused_decoder(tie_word_embeddings=True)
    save(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert off(logits(loaded), logits(model)) < 1e-5


def test_what_is_tied_decides_and_not_what_the_config_says(tmp_path: Path) -> None:
    model = fused_decoder(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    save(model, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fused_decoder().to(dtype)
    save(model, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    loaded = load(tmp_path / "out")
    assert loaded.dtype == dtype == loaded.config.dtype
    loaded.model.rotary_emb = model.model.rotary_emb  # `to` has rounded the model's own angles
    assert torch.equal(logits(loaded), logits(model))


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = fused_decoder()
    plan = save(model, tmp_path / "out", max_shard_size="200KB")
    assert len(plan.shards.files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == plan.to_dict()["index"]
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(plan.shards.files)
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


def test_layers_that_lost_everything_are_left_out(tmp_path: Path) -> None:
    model = without_attention(decoder(), (3, 5))
    for number in (3, 5):
        layer = model.model.layers[number]
        layer.mlp, layer.post_attention_layernorm = _Nothing(), torch.nn.Identity()
    plan = save(model, tmp_path / "out")
    assert plan.config["num_hidden_layers"] == 4 == len(plan.config["block_configs"])
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


def test_attention_without_an_ffn(tmp_path: Path) -> None:
    model = decoder()
    model.model.layers[3].mlp, model.model.layers[3].post_attention_layernorm = _Nothing(), torch.nn.Identity()
    plan = save(model, tmp_path / "out")
    assert plan.config["block_configs"][3]["ffn"] == {
        "ffn_mult": None,
        "no_op": True,
        "replace_with_linear": False,
        "sparsify": None,
    }
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5
    assert plan.engines["vllm"] is None


@pytest.mark.parametrize("family", ["qwen2", "phi3", "mistral"])
def test_other_families_of_the_same_structure(family: str, tmp_path: Path) -> None:
    """Biases on some projections, packed projections, another class."""
    config = AutoConfig.for_model(family, **settings(sliding_window=None, use_cache=False, intermediate_size=96))
    model = randomised(AutoModelForCausalLM.from_config(config))
    plan = save(model, tmp_path / "out")
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5
    assert plan.config["attention_bias"] is (family == "qwen2")
    if family == "qwen2":  # the layout has biases on all four or on none
        bias = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.o_proj.bias"]
        assert bias.shape == (HIDDEN,) and not bias.any()


def test_biases_everywhere(tmp_path: Path) -> None:
    model = decoder(attention_bias=True, mlp_bias=True, intermediate_size=100)
    plan = save(model, tmp_path / "out")
    assert plan.config["attention_bias"] is plan.config["mlp_bias"] is True
    assert off(logits(load(tmp_path / "out")), logits(model)) < 1e-5


def test_the_card_the_tokenizer_and_the_generation_settings_come_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    model = fused_decoder()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    save(model, tmp_path / "out", tokenizer=tokenizer, card=lambda engines: f"# A card for {len(engines)}\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# A card for 5\n"
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")("b").input_ids == [1]
    assert load(tmp_path / "out").generation_config.temperature == 0.3


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    model = fused_decoder()
    dry = plan_export(model, max_shard_size="200KB")
    assert not list(tmp_path.iterdir())
    assert dry.to_dict() == save(model, tmp_path / "out", max_shard_size="200KB").to_dict()
    json.dumps(dry.to_dict())
    assert dry.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) - _headers(
        tmp_path / "out"
    )


@pytest.mark.slow  # 10 s: captures
def test_a_dry_run_needs_no_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings()))
    plan = plan_export(model)
    assert "graphs of one layer of each kind are the same" in plan.proof
    assert [one.name for one in plan.tensors] == [one.name for one in plan_export(decoder()).tensors]
    assert len(model.model.layers) == 6 == model.config.num_hidden_layers, "looked at, not changed"


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = fused_decoder().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    save(model, tmp_path / "out")
    assert model.training and model.config.to_dict() == config
    assert all(value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow  # 15 s: captures
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_what_fuse_makes_is_written(tmp_path: Path, norm: str) -> None:
    import fxfusion

    model = decoder()
    fxfusion.fuse(model, fxfusion.FusionPlan(dropped_attention=[2, 3, 4], groups=[[2, 3, 4]], norm=norm))
    plan = save(model, tmp_path / "out")
    assert [block["ffn"]["ffn_mult"] for block in plan.config["block_configs"]] == [6.0, 6.0, 18.0, 6.0]
    gain = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.post_attention_layernorm.weight"]
    assert bool((gain == 1).all()) is (norm == "fold")
    loaded = load(tmp_path / "out")
    assert off(logits(loaded), logits(model)) < 1e-5
    if norm == "fold":
        assert off(logits(loaded), logits(fused_decoder())) < 1e-5, "the same as made by hand"
    assert loaded.config.vocab_size == VOCABULARY and ids().max() < VOCABULARY


class _Nothing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> int:
        return 0


def _headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


ALL = ("transformers", "vllm", "mlx-lm", "llama.cpp", "tensorrt-llm")
UNTESTED = {"llama.cpp": "not tested: format gguf is for it", "tensorrt-llm": "not tested"}
FINE = [block(2, 6.0), block(None, 18.0), block(2, 6.0)]


def engines(blocks: list[dict[str, Any]], **others: Any) -> dict[str, str | None]:
    chosen = {"vocab_size": 128256, "num_hidden_layers": len(blocks), "block_configs": blocks, **others}
    return engines_that_load(DeciLMConfig(**settings(**chosen)))


def test_a_usual_folder_loads_where_it_was_tested() -> None:
    assert engines(FINE) == dict.fromkeys(ALL) | UNTESTED


@pytest.mark.parametrize(
    ("blocks", "others", "refusing"),
    [
        ([block(None, 6.0), *FINE], {}, {"vllm": "the first layer has no attention"}),
        ([block(4, 6.0), *FINE], {}, {"vllm": r"n_heads_in_group differs between layers: [2, 4]"}),
        ([block(None, 6.0)], {}, {"vllm": "the first layer has no attention", "mlx-lm": "no layer has attention"}),
        (FINE, {"head_dim": 32}, {"mlx-lm": "head_dim is 32"}),
        (
            FINE,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {"mlx-lm": "no rope_type 'dynamic'"},
        ),
        ([*FINE, block(2, 6.0, ffn__replace_with_linear=True)], {}, dict.fromkeys(ALL, "replace_with_linear")),
    ],
)
def test_each_reason(blocks: list[dict[str, Any]], others: dict[str, Any], refusing: dict[str, str]) -> None:
    found = engines(blocks, **others)
    assert found.keys() == set(ALL)
    assert {engine for engine, reason in found.items() if reason is not None} == refusing.keys() | UNTESTED.keys()
    for engine, words in (UNTESTED | refusing).items():
        assert words in str(found[engine])


def test_the_content_of_a_file_is_not_changed() -> None:
    found = DeciLMConfig(**settings(num_hidden_layers=3, block_configs=FINE)).to_dict()
    before = repr(found)
    engines_that_load(found)
    assert repr(found) == before
