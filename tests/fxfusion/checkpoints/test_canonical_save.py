"""Canonical folders: plain transformers loads the unfused model from them; what cannot be said is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import fxfusion
from fxfusion.checkpoints.canonical_load import PLAN, load
from fxfusion.checkpoints.canonical_save import save
from fxfusion.errors import CheckpointError
from tests.end_to_end.caching import RED, decoder, off, recomputed, token_ids
from tests.end_to_end.families import Family
from tests.end_to_end.family_table import family_named
from tests.fxfusion.checkpoints import models
from tests.fxfusion.checkpoints.faults import Faults, Killed, count_operations
from tests.fxfusion.checkpoints.models import DROPPED, GROUPS, logits

PHI = Family(name="phi", norms=(), ffn_norm="input_layernorm")  # one norm for both, biases everywhere
BLOOM = Family(name="bloom", layers="transformer.h", config={"n_head": 4})  # the attention adds the stream itself
FAMILIES = [
    *(family_named(name) for name in ("gpt2", "gpt_neo", "gemma2", "cohere", "falcon", "gpt_neox", "olmo2", "mixtral")),
    *(PHI, BLOOM),
]


def test_plain_transformers_loads_what_is_left(tmp_path: Path) -> None:
    model = models.dropped()
    save(model, tmp_path / "m")
    again = models.plain(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert off(logits(model), logits(models.intact())) > RED
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored.keys() == models.intact().state_dict().keys()
    zeros = {name for name, value in stored.items() if not value.any()}
    assert zeros == stored.keys() - model.state_dict().keys() and len(zeros) == 3 * 5


@pytest.mark.parametrize("norm", ["fold", pytest.param("last", marks=pytest.mark.slow)])
def test_a_fused_model_is_written_unfused(tmp_path: Path, norm: str) -> None:
    save(models.fused(norm), tmp_path / "m")
    found, expected = models.plain(tmp_path / "m").state_dict(), models.dropped().state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=0) if norm == "fold" else found[name].equal(value)
    assert off(logits(models.plain(tmp_path / "m")), logits(models.dropped())) < 1e-5
    assert off(logits(models.fused(norm)), logits(models.dropped())) > RED


def test_the_config_is_that_of_the_intact_model_and_the_plan_lies_beside_it(tmp_path: Path) -> None:
    save(models.fused(), tmp_path / "m")
    before, after = (json.loads(text) for text in (models.intact().config.to_json_string(), read_config(tmp_path)))
    assert {key: value for key, value in after.items() if key not in ("architectures", "dtype")} == {
        key: value for key, value in before.items() if key not in ("architectures", "dtype")
    }
    plan = fxfusion.FusionPlan.load(tmp_path / "m" / PLAN)
    assert (plan.dropped_attention, plan.groups, plan.norm) == (DROPPED, GROUPS, "fold")
    assert plan.model is not None and plan.model.layers == 4


def read_config(tmp_path: Path) -> str:
    return (tmp_path / "m" / "config.json").read_text()


def test_an_intact_model_has_no_plan(tmp_path: Path) -> None:
    save(models.intact(), tmp_path / "m", max_shard_size="20KB")
    assert not (tmp_path / "m" / PLAN).exists()
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert torch.equal(logits(models.plain(tmp_path / "m")), logits(models.intact()))


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = models.fused()
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    save(model, tmp_path / "m")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_zeros_are_no_attention_in_every_family(tmp_path: Path, family: Family) -> None:
    """Logits of plain transformers are those of the model without the attention."""
    torch._dynamo.reset()
    whole = decoder(family)
    model = fxfusion.drop_attention(copy.deepcopy(whole), DROPPED)
    save(model, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    expected = recomputed(model, token_ids())
    assert off(recomputed(whole, token_ids()), expected) > RED
    assert off(recomputed(again, token_ids()), expected) < 1e-6
    loaded = load(tmp_path / "m")
    loaded.set_attn_implementation("eager")
    assert off(recomputed(loaded, token_ids()), expected) < 1e-6


@pytest.mark.slow
def test_attention_that_zeros_do_not_silence_is_refused(tmp_path: Path) -> None:
    """Queries of zeros over their own length, without an epsilon, are no numbers."""
    torch._dynamo.reset()
    family = replace(family_named("qwen3"), config={"rms_norm_eps": 0.0})
    model = fxfusion.drop_attention(decoder(family), [2])
    with pytest.raises(CheckpointError, match=r"layer 2 adds something even if all its weights are zero .*nan"):
        save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model = decoder(family_named("llama"), tie_word_embeddings=True)
    save(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    for again in (models.plain(tmp_path / "m"), load(tmp_path / "m")):
        assert again.lm_head.weight is again.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(CheckpointError, match="lm_head.weight is model.embed_tokens.weight, and they differ"):
        save(model, tmp_path / "m")


def on_meta(model: Any) -> None:
    model.model.norm.to("meta")


def other_type(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.ones(32).as_subclass(type("Quantised", (torch.Tensor,), {})))


def one_more(model: Any) -> None:
    model.model.layers[2].mlp.extra = nn.Linear(2, 2)


def one_less(model: Any) -> None:
    del model.model.layers[0].self_attn.q_proj.weight


def narrower(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.ones(40, 32))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (on_meta, "model.norm.weight is on the meta device"),
        (other_type, "model.norm.weight is a Quantised"),
        (one_more, "model.layers.2.mlp.extra.bias is no tensor of the model"),
        (one_less, "lacks model.layers.0.self_attn.q_proj.weight, and no attention that was dropped had it"),
        (narrower, r"layers.2.mlp.up_proj.weight is \[40, 32\] in the model, and the config says \[48, 32\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], None], why: str
) -> None:
    save(models.intact(), tmp_path / "m")
    model = models.dropped()
    change(model)
    with pytest.raises(CheckpointError, match=why):
        save(model, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m")), logits(models.intact()))


def test_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Linear is no transformers model"):
        save(nn.Linear(2, 2), tmp_path / "m")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*could not be removed")
@pytest.mark.parametrize("kind", ["full", "kill"])
def test_a_save_that_fails_anywhere_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """At each of its operations on the disk: the old weights are there, to the bit, or the new ones are."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    old, new = models.intact(), models.dropped()
    expected = {"old": logits(old), "new": logits(new)}
    save(old, tmp_path / "m")
    points = count_operations(lambda: save(new, tmp_path / "elsewhere", max_shard_size="10KB"))
    assert points >= 50
    seen = []
    for at in range(points):
        with pytest.MonkeyPatch.context() as faulty:
            Faults(faulty, at, kind)
            try:
                save(new, tmp_path / "m", max_shard_size="10KB")
            except (CheckpointError, Killed) as error:
                assert isinstance(error, Killed) == (kind == "kill")
                assert kind == "kill" or "No space left" in str(error)
        found = logits(models.plain(tmp_path / "m"))
        seen.append(next(name for name, value in expected.items() if torch.equal(found, value)))
        if seen[-1] == "new":
            save(old, tmp_path / "m")
    assert seen.count("old") >= points - 3
