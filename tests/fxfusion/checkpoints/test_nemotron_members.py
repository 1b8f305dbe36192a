"""Folders of fused weights give their members back, and say what is wrong where they cannot."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

import fxfusion
from fxfusion.checkpoints.nemotron_nas.export import save
from fxfusion.checkpoints.nemotron_nas.load import load
from fxfusion.checkpoints.nemotron_nas.members import PLAN, RESIDUE, load_unfused
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints.nemotron_models import FUSED, decoder, logits, off, randomised, settings

NARROW = {"intermediate_size": 200}  # padded to 256 in each member's part, 600 to 768 in the fused FFN
GAIN = "model.layers.3.post_attention_layernorm.weight"


def fused(model: Any, norm: str = "fold", shards: int = 1) -> Any:
    plan = {"dropped_attention": FUSED, "groups": [FUSED], "norm": norm}
    return fxfusion.fuse(model, plan, shards=shards)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def dropped(model: Any) -> Any:
    """One gain is zero, so that the fused weights do not tell what was behind it."""
    with torch.no_grad():
        model.get_parameter(GAIN)[5] = 0
    return fxfusion.drop_attention(model, FUSED)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not to be changed."""
    folder = tmp_path_factory.mktemp("fused") / "model"
    save(fused(dropped(decoder(**NARROW))), folder)
    return folder


@pytest.mark.parametrize(
    ("norm", "others"),
    [("fold", NARROW), ("last", {"mlp_bias": True, "tie_word_embeddings": True})],
    ids=["folded and narrow", "with biases, tied"],
)
def test_the_model_from_before_comes_back(tmp_path: Path, norm: str, others: dict[str, Any]) -> None:
    model = dropped(decoder(**others))
    before, expected = state_of(model), logits(model)
    save(fused(model, norm, shards=2 if norm == "last" else 1), tmp_path / "out")
    again = load_unfused(tmp_path / "out")
    assert type(again) is type(model) and again.config.num_hidden_layers == 6
    after = again.state_dict()
    assert after.keys() == before.keys()
    if norm == "last":
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert max(off(after[name], before[name]) for name in before) < 1e-6
    assert off(logits(again), expected) < 1e-5
    assert off(logits(load(tmp_path / "out")), expected) > 1e-2, "what is fused is another function"
    assert fxfusion.fuse(again, {"groups": [FUSED], "norm": norm}) is again, "and can be fused anew"


@pytest.mark.slow
def test_packed_weights_and_a_dtype(tmp_path: Path) -> None:
    config = Phi3Config(**settings(**NARROW, attention_dropout=0.0))
    model = fxfusion.drop_attention(randomised(Phi3ForCausalLM(config)), FUSED).to(torch.bfloat16)
    before = state_of(model)
    save(fused(model, "last"), tmp_path / "out")
    again = load_unfused(tmp_path / "out", dtype=torch.float32)
    assert isinstance(again, Phi3ForCausalLM) and again.dtype == again.config.dtype == torch.float32
    assert all(torch.equal(value, before[name].float()) for name, value in again.state_dict().items())


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_a_model_of_the_layout_itself(tmp_path: Path) -> None:
    """As published folders are: read, fused further, written, and unfused again."""
    save(fxfusion.drop_attention(decoder(), FUSED), tmp_path / "published")
    model = load(tmp_path / "published")
    before, expected = state_of(model), logits(model)
    fxfusion.save_pretrained(fused(model), tmp_path / "out", format="nemotron-nas")
    again = fxfusion.from_pretrained(tmp_path / "out", fused=False)
    assert type(again) is type(model)
    assert max(off(value, before[name]) for name, value in again.state_dict().items()) < 1e-6
    assert off(logits(again), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:no tokenizer")
def test_members_that_are_not_kept_are_missed_aloud(written: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the members of its fused FFNs are not kept: only .*model has them"):
        save(load(written), tmp_path / "again")
    assert not (tmp_path / "again" / RESIDUE).exists() and not (tmp_path / "again" / PLAN).exists()


def test_a_changed_weight_is_seen_by_these_comparisons(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "copy")
    change(folder / "model.safetensors", lambda found: found["model.layers.2.mlp.up_proj.weight"][300].mul_(1.5))
    changed = load_unfused(folder).state_dict()["model.layers.3.mlp.up_proj.weight"]
    assert off(changed, decoder(**NARROW).state_dict()["model.layers.3.mlp.up_proj.weight"]) > 0.1


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, notes)


def renamed_hash(folder: Path) -> None:
    """The plan names the file as it is now: somebody who changes the one can change the other."""
    plan = fxfusion.FusionPlan.load(folder / PLAN)
    digest = hashlib.sha256((folder / RESIDUE).read_bytes()).hexdigest()
    plan.replace(residue={"file": RESIDUE, "sha256": digest}).save(folder / PLAN, overwrite=True)


def cut_off(folder: Path) -> None:
    (folder / RESIDUE).write_bytes((folder / RESIDUE).read_bytes()[:-4])


def another(folder: Path) -> None:
    change(folder / RESIDUE, lambda found: found[GAIN].add_(1))


def unnamed(folder: Path) -> None:
    fxfusion.FusionPlan.load(folder / PLAN).replace(residue=None).save(folder / PLAN, overwrite=True)


def elsewhere(folder: Path) -> None:
    plan = fxfusion.FusionPlan.load(folder / PLAN)
    plan.replace(residue={"file": "../x.st", "sha256": "0" * 64}).save(folder / PLAN, overwrite=True)


def without_notes(folder: Path) -> None:
    save_file(load_file(folder / RESIDUE), folder / RESIDUE)
    renamed_hash(folder)


def other_norm(folder: Path) -> None:
    fxfusion.FusionPlan.load(folder / PLAN).replace(norm="last").save(folder / PLAN, overwrite=True)


def in_other_words(edit: Callable[[dict[str, Tensor]], Any], file: str = RESIDUE) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        change(folder / file, edit)
        renamed_hash(folder)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / RESIDUE).unlink(), f"{RESIDUE} is missing"),
        (lambda folder: (folder / PLAN).unlink(), "keeps no members: it has no fxfusion_plan.yaml"),
        (unnamed, "that names no residue"),
        (elsewhere, "names the file '../x.st', which is not one in the folder"),
        (cut_off, f"{RESIDUE} is cut off or was changed: fxfusion_plan.yaml names a file with another sha256"),
        (another, f"{RESIDUE} is cut off or was changed"),
        (without_notes, f"{RESIDUE} does not say which model was fused"),
        (other_norm, f"groups or norm are not those that {RESIDUE} was written with"),
        (in_other_words(lambda found: found.update(more=torch.ones(3))), f"{RESIDUE}: more is no tensor of the model"),
        (
            in_other_words(lambda found: found[GAIN].mul_(0)),
            "model.layers.3.mlp.gate_proj.weight:columns is [200, 1], the model's is [200, 64]",
        ),
        (
            in_other_words(lambda found: found["model.layers.2.mlp.up_proj.weight"].add_(1), "model.safetensors"),
            "model.layers.2.mlp.up_proj.weight has values where its members have none",
        ),
    ],
)
def test_what_is_wrong_is_named(written: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    folder = shutil.copytree(written, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(CheckpointError) as error:
        load_unfused(folder)
    assert message in str(error.value)
