"""Folders that transformers wrote in another form than its modules have are read as transformers reads them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxfusion
from fxfusion.checkpoints.converted import changed_own, changes_stored
from fxfusion.errors import CheckpointError, OptionError
from tests.fxfusion.checkpoints.models import intact, logits

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_FEW = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": _FEW,
    "qwen2_moe": {**_FEW, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "granitemoe": _FEW,
    "phimoe": _FEW,
    "olmo_hybrid": {"pad_token_id": 0, "num_hidden_layers": 4, "layer_types": None},
    "hrm_text": {},
}
WEIGHTS = "model.safetensors"


def model_of(kind: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**_SIZES | MORE[kind])).eval()


def written(kind: str, folder: Path) -> Any:
    model = model_of(kind)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MORE)
def test_every_tensor_is_that_of_the_model_that_was_saved(kind: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path)
    found = fxfusion.from_pretrained(tmp_path).state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(found[name].equal(value) for name, value in model.state_dict().items())
    assert set(load_file(tmp_path / WEIGHTS)) != set(found), "the folder has the model's own form: nothing is tested"


def test_a_canonical_folder_of_such_a_model_is_read_by_both(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = model_of("mixtral")
    with pytest.warns(UserWarning, match="no tokenizer"):
        fxfusion.save_pretrained(model, tmp_path / "own")
    for again in (fxfusion.from_pretrained(tmp_path / "own"), AutoModelForCausalLM.from_pretrained(tmp_path / "own")):
        assert all(again.state_dict()[name].equal(value) for name, value in model.state_dict().items())


def test_a_plan_is_applied_after_the_conversion(tmp_path: Path) -> None:
    written("olmo_hybrid", tmp_path)
    fxfusion.FusionPlan(dropped_attention=[1]).save(tmp_path / "fxfusion_plan.yaml")
    assert fxfusion.from_pretrained(tmp_path).config.fxfusion["dropped_attention"] == [1]


def broken(folder: Path, change: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if ".experts.1." in name)
    if change == "missing":
        tensors["padding"] = tensors.pop(name)
    elif change == "shape":
        tensors[name] = tensors[name].reshape(-1, tensors[name].shape[0] * 2)
    else:
        tensors["left_over"] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("change", ["missing", "shape", "left_over"])
def test_bad_tensors_are_refused(change: str, tmp_path: Path) -> None:
    written("mixtral", tmp_path)
    broken(tmp_path, change)
    with pytest.raises(CheckpointError, match="left_over|gate_up_proj|down_proj|cannot load its tensors"):
        fxfusion.from_pretrained(tmp_path)


def test_memory_is_not_taken_for_what_the_files_do_not_have(tmp_path: Path) -> None:
    written("mixtral", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": 2**40}))
    with pytest.raises(CheckpointError, match=r"the config asks for \d+ values, and the files have \d+"):
        fxfusion.from_pretrained(tmp_path)


def test_adapters_in_the_folder_are_not_loaded(tmp_path: Path) -> None:
    written("mixtral", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json: the folder holds adapters"):
        fxfusion.from_pretrained(tmp_path)


def test_settings_that_patch_classes_or_name_other_files_are_left_out(tmp_path: Path) -> None:
    written("mixtral", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"fusion_config": {"no_such": True}, "transformers_weights": "../other.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = fxfusion.from_pretrained(tmp_path).config
    assert not hasattr(config, "fusion_config") and getattr(config, "transformers_weights", None) is None


def test_a_rounding_on_the_way_is_said(tmp_path: Path) -> None:
    model_of("mixtral").bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"model.norm.weight \[32\] float32 is read as torch.bfloat16"):
        fxfusion.from_pretrained(tmp_path)


def test_names_that_transformers_would_change_are_known() -> None:
    assert changes_stored(model_of("mixtral")) and not changes_stored(intact())
    assert changed_own(model_of("mixtral")) is None and changed_own(intact()) is None


def test_a_value_that_would_be_changed_under_its_own_name_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

    def known(change: Any) -> None:
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [change])

    known(WeightConverter("o_proj.weight", "o_proj.weight", operations=[Transpose(0, 1)]))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.o_proj.weight: transformers stores it in another"):
        fxfusion.save_pretrained(intact(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    known(WeightRenaming("o_proj", "out_proj"))
    with pytest.warns(UserWarning, match=r"plain transformers will not load the folder, since it takes .*o_proj"):
        fxfusion.save_pretrained(intact(), tmp_path / "b")
    assert fxfusion.from_pretrained(tmp_path / "b").state_dict().keys() == intact().state_dict().keys()


@pytest.mark.parametrize("dtype", ["auto", None, "bfloat16", "torch.float16", torch.float64])
def test_dtypes_by_name_and_as_stored(dtype: Any, tmp_path: Path) -> None:
    model = intact()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxfusion.save_pretrained(model, tmp_path / "own")
    wanted = {"bfloat16": torch.bfloat16, "torch.float16": torch.float16, torch.float64: torch.float64}
    again = fxfusion.from_pretrained(tmp_path / "own", dtype=dtype)
    assert again.dtype == wanted.get(dtype, torch.float32)
    if dtype in ("auto", None):
        assert logits(again).equal(logits(model))


@pytest.mark.parametrize("dtype", ["floats", "int8", torch.int8, "nn", 16, ""])
def test_a_bad_dtype_is_named_before_anything_is_read(dtype: Any) -> None:
    with pytest.raises(OptionError, match="dtype: expected a floating-point torch.dtype"):
        fxfusion.from_pretrained("no/such/folder", dtype=dtype)
