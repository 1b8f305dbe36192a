"""Canonical folders are loaded with the plan applied on the way; bad ones are refused by name."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxfusion
from fxfusion.checkpoints import canonical_load
from fxfusion.checkpoints.canonical_load import CONFIG, GENERATION_CONFIG, PLAN, load
from fxfusion.checkpoints.canonical_save import save
from fxfusion.checkpoints.empty_model import changed_own, changes_stored
from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.errors import CheckpointError, OptionError, PlanError
from tests.end_to_end.caching import decoder, off, recomputed, token_ids
from tests.end_to_end.family_table import family_named
from tests.fxfusion.checkpoints import models
from tests.fxfusion.checkpoints.models import DROPPED, GROUPS, intact, logits

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the same model: intact, without attention, fused by both norms."""
    made: dict[str, Any] = {"intact": models.intact(), "dropped": models.dropped()}
    made |= {norm: models.fused(norm) for norm in ("fold", "last")}
    root = tmp_path_factory.mktemp("canonical")
    for name, model in made.items():
        save(model, root / name)
    return {name: root / name for name in made}


@lru_cache
def _fused_again(folder: Path) -> Any:
    return load(folder)


@pytest.mark.parametrize("norm", ["last", pytest.param("fold", marks=pytest.mark.slow)])
def test_a_fused_model_comes_back(saved: dict[str, Path], norm: str) -> None:
    again, model = _fused_again(saved[norm]), models.fused(norm)
    found, expected = again.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value) if norm == "last" else torch.allclose(found[name], value, rtol=1e-6, atol=0)
    assert off(logits(again), logits(model)) < 1e-5
    assert again.config.fxfusion == model.config.fxfusion
    assert not again.training and all(value.requires_grad for value in again.parameters())


@pytest.mark.slow
def test_a_fused_model_that_was_loaded_can_be_unfused_and_saved_again(saved: dict[str, Path], tmp_path: Path) -> None:
    again = load(saved["fold"])
    save(again, tmp_path / "m")
    for name, value in load_file(saved["fold"] / WEIGHTS).items():
        assert torch.allclose(load_file(tmp_path / "m" / WEIGHTS)[name], value, rtol=1e-6, atol=0)
    fxfusion.unfuse(again)
    assert off(logits(again), logits(models.dropped())) < 1e-5
    added = {"_name_or_path", "architectures", "dtype"}
    assert {key: value for key, value in again.config.to_dict().items() if key not in added} == {
        key: value for key, value in models.dropped().config.to_dict().items() if key not in added
    }


def test_a_model_without_attention_and_a_plain_one_come_back(saved: dict[str, Path]) -> None:
    for name, model in (("dropped", models.dropped()), ("intact", models.intact())):
        again = load(saved[name])
        assert torch.equal(logits(again), logits(model))
        assert again.state_dict().keys() == model.state_dict().keys()


def test_dropped_attention_is_never_read_and_members_go_group_by_group(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    read, put = CheckpointReader.read, canonical_load.set_parameter
    monkeypatch.setattr(
        CheckpointReader, "read", lambda self, name: (events.append(f"read {name}"), read(self, name))[1]
    )
    monkeypatch.setattr(
        canonical_load, "set_parameter", lambda model, name, value: (events.append(name), put(model, name, value))
    )
    load(saved["fold"])
    reads = [event.removeprefix("read ") for event in events if event.startswith("read ")]
    assert len(reads) == len(set(reads))
    layers = [name for name in reads if ".self_attn." in name or ".input_layernorm." in name]
    assert layers and all(name.startswith("model.layers.0.") for name in layers)
    members = [name for name in reads if any(name.startswith(f"model.layers.{layer}.") for layer in GROUPS[0])]
    assert reads[-len(members) :] == members, "something else was read between the members of a group"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision(saved: dict[str, Path], dtype: torch.dtype) -> None:
    again = load(saved["last"], dtype=dtype)
    assert {value.dtype for value in again.parameters()} == {dtype} == {again.dtype, again.config.dtype}
    reference = models.fused("last").to(dtype)
    assert off(logits(again), logits(reference)) < (1e-6 if dtype == torch.float64 else 3e-2)


@pytest.mark.slow
def test_a_model_that_cannot_be_fused_without_weights_is_fused_with_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Code of some models makes tensors on the CPU, and so does not run on the meta device."""
    torch._dynamo.reset()
    plan = {"dropped_attention": DROPPED, "groups": GROUPS}
    model = fxfusion.fuse(decoder(family_named("gpt_neo")), plan)
    save(model, tmp_path / "m")
    with caplog.at_level(logging.INFO, "fxfusion"):
        again = load(tmp_path / "m")
    assert "the plan is applied after the weights are read" in caplog.text
    again.set_attn_implementation("eager")
    assert off(recomputed(again, token_ids()), recomputed(model, token_ids())) < 1e-5
    assert again.state_dict().keys() == model.state_dict().keys()


# --- folders of others --------------------------------------------------------------------------------


def test_names_without_the_models_prefix_and_buffers_of_old_versions(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["intact"], tmp_path / "m")
    content = {name.removeprefix("model."): value for name, value in load_file(folder / WEIGHTS).items()}
    content["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(content, folder / WEIGHTS)
    assert torch.equal(logits(load(folder)), logits(models.intact()))


def test_either_of_two_tied_tensors_may_be_there_and_both_if_they_are_equal(tmp_path: Path) -> None:
    model = decoder(family_named("llama"), tie_word_embeddings=True)
    save(model, tmp_path / "m")
    content = load_file(tmp_path / "m" / WEIGHTS)
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, tmp_path / "m" / WEIGHTS)
    both = logits(load(tmp_path / "m"))
    embedding = content.pop("model.embed_tokens.weight")
    save_file(content, tmp_path / "m" / WEIGHTS)
    assert torch.equal(logits(load(tmp_path / "m")), both)
    save_file({**content, "model.embed_tokens.weight": embedding + 1}, tmp_path / "m" / WEIGHTS)
    with pytest.raises(CheckpointError, match="lm_head.weight is model.embed_tokens.weight, and the files have two"):
        load(tmp_path / "m")


def test_code_that_a_folder_brings_is_never_run(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["intact"], tmp_path / "m")
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    assert torch.equal(logits(load(folder)), logits(models.intact()))
    edit_config(folder, model_type="evil")
    with pytest.raises(CheckpointError, match="no model_type 'evil', and code of the folder is never run"):
        load(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_plan(folder: Path, old: str, new: str) -> None:
    text = (folder / PLAN).read_text()
    assert old in text
    (folder / PLAN).write_text(text.replace(old, new))


BAD: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (lambda folder: (folder / CONFIG).unlink(), CheckpointError, f"{CONFIG} is missing"),
    (lambda folder: edit_config(folder, num_hidden_layers=10**9), CheckpointError, "asks for 1000000000 layers"),
    (lambda folder: edit_config(folder, hidden_size=10**7), CheckpointError, r"embed_tokens.weight is \[97, 32\]"),
    (lambda folder: edit_config(folder, hidden_size="wide"), CheckpointError, f"{CONFIG}: no valid config of a llama"),
    (lambda folder: edit_config(folder, intermediate_size=40), CheckpointError, r"gate_proj.weight is \[48, 32\]"),
    (lambda folder: edit_config(folder, model_type="t5"), CheckpointError, "no causal language model"),
    (lambda folder: edit_config(folder, quantization_config={"quant_method": "x"}), CheckpointError, "quantised"),
    (
        lambda folder: (folder / GENERATION_CONFIG).write_text("[]"),
        CheckpointError,
        f"{GENERATION_CONFIG} holds a list",
    ),
    (lambda folder: edit_plan(folder, "layers: 4", "layers: 5"), PlanError, "made for another model"),
    (lambda folder: edit_plan(folder, "[1, 2, 3]\n", "[1, 2, 9]\n"), PlanError, r"layer 9 does not exist"),
    (
        lambda folder: edit_plan(folder, "dropped_attention: [1, 2, 3]", "dropped_attention: [1]"),
        PlanError,
        "2 is in no chain",
    ),
    (lambda folder: (folder / PLAN).write_text("groups: [[1, 2"), PlanError, f"{PLAN}:1: not valid YAML"),
    (lambda folder: (folder / WEIGHTS).unlink(), CheckpointError, "not written to its end"),
]


@pytest.mark.parametrize(("spoil", "kind", "why"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_folder_is_refused_by_name(
    saved: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], object], kind: type[Exception], why: str
) -> None:
    folder = shutil.copytree(saved["fold"], tmp_path / "m")
    spoil(folder)
    with pytest.raises(kind, match=why):
        load(folder)


# --- memory -------------------------------------------------------------------------------------------

LARGE = dict(
    hidden_size=1024,
    intermediate_size=9216,
    num_hidden_layers=7,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=512,
)
LARGE_GROUPS = [[1, 2], [3, 4, 5]]

MEASURE = """
import sys
from pathlib import Path
from fxfusion.checkpoints.canonical_load import load

def memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

load(sys.argv[1])  # what is imported and compiled once is no matter here
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
model = load(sys.argv[2])
size = sum(value.nbytes for value in model.parameters())
print(size, memory("VmHWM") - before)
"""


def test_a_model_has_memory_of_its_own_whatever_becomes_of_its_files(tmp_path: Path) -> None:
    """Transformers alone would give it the pages of its file."""
    save(models.intact(), tmp_path / "m")
    model = load(tmp_path / "m")
    expected = logits(model)
    with open(tmp_path / "m" / WEIGHTS, "r+b") as file:
        file.write(bytes((tmp_path / "m" / WEIGHTS).stat().st_size))
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_peak_memory_is_the_model_and_the_widest_group(saved: dict[str, Path], tmp_path: Path) -> None:
    """Less, in fact: members are read and let go one projection at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LARGE))
    save(model, tmp_path / "m")
    plan = fxfusion.FusionPlan(dropped_attention=[1, 2, 3, 4, 5], groups=LARGE_GROUPS)
    plan.save(tmp_path / "m" / PLAN, overwrite=True)
    layer = sum(value.nbytes for value in model.model.layers[1].mlp.parameters())
    del model
    command = [sys.executable, "-c", MEASURE, str(saved["fold"]), str(tmp_path / "m")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    size, peak = map(int, done.stdout.split())
    assert size > 6 * layer > 600e6
    assert peak <= size + 3 * layer, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    assert peak > size, "the measure sees no group at all"


# --- what transformers stores in another form than its modules have it ----------------------------------

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
    edit_config(tmp_path, vocab_size=2**40)
    with pytest.raises(CheckpointError, match=r"the config asks for \d+ values, and the files have \d+"):
        fxfusion.from_pretrained(tmp_path)


def test_adapters_in_the_folder_are_not_loaded(tmp_path: Path) -> None:
    written("mixtral", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json: the folder holds adapters"):
        fxfusion.from_pretrained(tmp_path)


def test_settings_that_patch_classes_or_name_other_files_are_left_out(tmp_path: Path) -> None:
    written("mixtral", tmp_path)
    edit_config(tmp_path, fusion_config={"no_such": True}, transformers_weights="../other.safetensors")
    config = fxfusion.from_pretrained(tmp_path).config
    assert not hasattr(config, "fusion_config") and getattr(config, "transformers_weights", None) is None


def test_what_is_stored_in_other_dtypes_keeps_them_and_a_rounding_on_the_way_is_said(tmp_path: Path) -> None:
    model_of("mixtral").bfloat16().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() / 3
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fxfusion.from_pretrained(tmp_path)
    assert found.dtype == torch.bfloat16 and found.model.norm.weight.equal(tensors["model.norm.weight"])
    assert fxfusion.from_pretrained(tmp_path, dtype="bfloat16").model.norm.weight.dtype == torch.bfloat16
    expert = next(name for name in tensors if ".experts.1." in name)
    save_file({**tensors, expert: tensors[expert].float()}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.warns(UserWarning, match=rf"{expert} \[.*\] float32 is read as torch.bfloat16"):
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
