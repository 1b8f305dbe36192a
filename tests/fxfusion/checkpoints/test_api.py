"""The public functions: formats, tokenizer and card beside the model, the reference model there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxfusion
from bench.reference import MODEL_FOLDER, heldout_batches, load_model
from fxfusion.errors import CheckpointError, OptionError, PlanError
from tests.end_to_end.caching import RED, off, recomputed
from tests.fxfusion.checkpoints import models

PLAN = {"dropped_attention": [5, 6, 7, 8, 9], "groups": [[4, 5, 6], [7, 8, 9]]}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_the_reference_model_there_and_back(tmp_path: Path, norm: str) -> None:
    """Fused, saved, loaded: the same model. Loaded by transformers: the model that only lost its attention."""
    torch._dynamo.reset()
    ids = heldout_batches(batch=2, seq=64, limit=1)[0]
    without = recomputed(fxfusion.drop_attention(load_model(), PLAN["dropped_attention"]), ids)
    model = fxfusion.fuse(load_model(), PLAN | {"norm": norm})
    fused = recomputed(model, ids)
    fxfusion.save_pretrained(model, tmp_path / "m", max_shard_size="10MB")
    again = fxfusion.from_pretrained(tmp_path / "m")
    assert off(recomputed(again, ids), fused) < (1e-5 if norm == "fold" else 1e-7)
    if norm == "last":
        assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert off(recomputed(plain, ids), without) < 1e-5
    assert off(fused, without) > RED
    assert fxfusion.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tokenizer_and_card_lie_beside_the_model(tmp_path: Path) -> None:
    model = load_model()
    fxfusion.save_pretrained(model, tmp_path / "m", card={"license": "apache-2.0", "quality": {"perplexity": 21.29}})
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("def f").input_ids
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.license == "apache-2.0" and "| perplexity | 21.29 |" in card.text
    again = fxfusion.from_pretrained(tmp_path / "m")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    fxfusion.save_pretrained(again, tmp_path / "n")
    assert (tmp_path / "n" / "tokenizer.json").read_bytes() == (MODEL_FOLDER / "tokenizer.json").read_bytes()


def test_a_model_may_be_saved_where_it_came_from(tmp_path: Path) -> None:
    fxfusion.save_pretrained(load_model(), tmp_path / "m")
    again = fxfusion.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    fxfusion.save_pretrained(again, tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert fxfusion.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="expected one of canonical, nemotron-nas, transformers, anymodel, gguf, got 'onnx'"
    ):
        fxfusion.save_pretrained(models.intact(), tmp_path / "m", format="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        fxfusion.from_pretrained(tmp_path / "m")
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        fxfusion.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="config.json has no model_type"):
        fxfusion.from_pretrained(tmp_path / "m")


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_channels_in_the_order_of_several_devices(tmp_path: Path) -> None:
    plan = {"dropped_attention": [1, 2], "groups": [[0, 1, 2]], "norm": "last"}
    fxfusion.save_pretrained(models.intact(), tmp_path / "model", plan=plan)
    one, two = (fxfusion.from_pretrained(tmp_path / "model", shards=shards) for shards in (1, 2))
    rows = [model.model.layers[0].mlp.gate_proj.weight for model in (one, two)]
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0].sort(0).values, rows[1].sort(0).values)
    ids = torch.arange(2, 12)[None]
    assert torch.allclose(one(ids).logits, two(ids).logits, atol=1e-5)
    fxfusion.save_pretrained(one, tmp_path / "export", format="nemotron-nas")
    with pytest.raises(CheckpointError, match="fuse with shards=2 before exporting"):
        fxfusion.from_pretrained(tmp_path / "export", shards=2)


@pytest.mark.filterwarnings("ignore:no tokenizer")
@pytest.mark.parametrize("format", ["canonical", "nemotron-nas"])
def test_what_is_no_part_of_the_model_is_refused_with_what_to_do(tmp_path: Path, format: Any) -> None:
    import peft
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = peft.get_peft_model(models.intact(), peft.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn.v_proj has adapters.*merge them first"):
        fxfusion.save_pretrained(model, tmp_path / "out", format)
    fxfusion.save_pretrained(model.merge_and_unload(), tmp_path / "out", format)
    quantised = models.intact()
    quantize_(quantised, Int8WeightOnlyConfig())
    with pytest.raises(CheckpointError, match=r"proj.weight is a Int8Tensor, .* save the model first, then quantise"):
        fxfusion.save_pretrained(quantised, tmp_path / "out", format)
    quantised = models.intact()
    quantised.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(CheckpointError, match="the model is quantised .* save it first, then quantise"):
        fxfusion.save_pretrained(quantised, tmp_path / "out", format)


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_a_plan_keeps_the_members_weights_and_fuses_the_model(tmp_path: Path) -> None:
    model = models.intact()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fxfusion.save_pretrained(model, tmp_path / "model", plan={"dropped_attention": [1, 2], "groups": [[0, 1, 2]]})
    assert len(model.model.layers) == 2, "fused in place"
    members = fxfusion.from_pretrained(tmp_path / "model", fused=False)
    assert all(torch.equal(value, before[name]) for name, value in members.state_dict().items())


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_a_plan_that_does_not_fit_writes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    model = models.intact()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match="is in no chain"):
        fxfusion.save_pretrained(model, tmp_path / "model", plan={"dropped_attention": [1], "groups": [[2, 3]]})
    assert not (tmp_path / "model").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.config, "fxfusion")


def test_the_engines_layout_has_no_canonical_form(tmp_path: Path) -> None:
    """Only without its groups: those members have a class of their own."""
    fxfusion.save_pretrained(models.fused("last"), tmp_path / "export", format="nemotron-nas")
    with pytest.raises(CheckpointError, match="a model in the nemotron-nas layout has no canonical form"):
        fxfusion.save_pretrained(fxfusion.from_pretrained(tmp_path / "export"), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    members = fxfusion.from_pretrained(tmp_path / "export", fused=False)
    fxfusion.save_pretrained(members, tmp_path / "again")
    assert fxfusion.from_pretrained(tmp_path / "again").config.model_type == members.config.model_type
