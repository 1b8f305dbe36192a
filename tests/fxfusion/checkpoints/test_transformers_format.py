"""`format="transformers"`: a fused model of any family, in a process that has transformers and not fxfusion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxfusion
from fxfusion.checkpoints.per_layer.export import ExportPlan, save
from fxfusion.checkpoints.per_layer.proof import prove
from fxfusion.cli.inputs import load_config
from fxfusion.errors import CheckpointError
from fxfusion.plan.fusion_plan import FusionPlan
from tests.end_to_end.caching import decoder, token_ids
from tests.end_to_end.family_table import family_named
from tests.fxfusion.checkpoints import models

WINDOW = {"members": [3, 4], "mixers": "hoist"}
DROPPED = FusionPlan(dropped_attention=[1, 2, 5], groups=[[1, 2]])
"""Of six layers three are left: 0 with the FFN of 1 and 2 behind it, 3, and 4 with that of 5 behind it."""
MIXED = FusionPlan(dropped_attention=[1, 2, 5], groups=[[1, 2], WINDOW])
"""The same, and 3 is attention alone, 4 has the FFN of both."""
WIDE = FusionPlan(dropped_attention=[1], groups=[[0, 1], {"members": [3, 4], "mixers": "wide"}], norm="last")
PLANS = {"mixed": MIXED, "dropped": DROPPED, "wide": WIDE}
FAMILIES = {
    "mixed": "llama gpt2 granite phi3".split(),
    "dropped": "opt gpt_neox cohere".split(),
    "wide": ["qwen3"],
}
CASES = [f"{family}-{plan}" for plan, families in FAMILIES.items() for family in families]
LIMIT = 1e-5
CHILD = """
import json, sys
sys.modules["fxfusion"] = None
try:
    import fxfusion
except ImportError:
    pass
else:
    raise SystemExit("fxfusion can be imported")
import torch
from transformers import AutoModelForCausalLM
tokens, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in sys.argv[2:]:
    answers = found[folder] = {}
    for kind in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=kind).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        assert model.config._attn_implementation == kind
        with torch.no_grad():
            full = model(tokens, use_cache=False, output_hidden_states=True)
            steps = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        states = [len(full.hidden_states), model.config.num_hidden_layers]
        answers[kind] = {"logits": full.logits.tolist(), "tokens": steps.tolist(), "states": states}
print(json.dumps(found))
"""


def fused(case: str) -> Any:
    family, plan = case.split("-")
    model = decoder(family_named(family), num_hidden_layers=6, tie_word_embeddings=family == "granite")
    return fxfusion.fuse(model, PLANS[plan])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folders, in one, and the models in memory, by case."""
    root = tmp_path_factory.mktemp("transformers")
    fused_models = {case: fused(case) for case in CASES}
    for case, model in fused_models.items():
        save(model, root / case)
    return root, fused_models


@pytest.fixture(scope="module")
def answers(written: tuple[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By case: what the model in memory says, and what a process without fxfusion says of its folder."""
    root, fused_models = written
    found: dict[str, dict[str, Any]] = {}
    for case, model in fused_models.items():
        tokens = token_ids()
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
            steps = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        found[case] = {"memory": {"logits": logits.tolist(), "tokens": steps.tolist()}}
    command = [sys.executable, "-c", CHILD, json.dumps(token_ids().tolist()), *(str(root / case) for case in CASES)]
    environment = {**os.environ, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    return {case: found[case] | told[str(root / case)] for case in CASES}


def off(one: Any, other: Any) -> float:
    """The largest difference over the largest value."""
    one, other = torch.tensor(one), torch.tensor(other)
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.slow  # minutes: families are fused, and one process loads them all
@pytest.mark.parametrize("case", CASES)
def test_transformers_alone_says_the_same(answers: dict[str, dict[str, Any]], case: str) -> None:
    found = answers[case]
    for kind in ("eager", "sdpa"):
        assert off(found[kind]["logits"], found["memory"]["logits"]) < LIMIT
        assert found[kind]["tokens"] == found["memory"]["tokens"]
        states, layers = found[kind]["states"]
        assert states == layers + 1, "a block behind a layer is none of the layers"
    other = next(one for one in CASES if one != case and one.split("-")[0] != case.split("-")[0])
    assert off(found["eager"]["logits"], answers[other]["memory"]["logits"]) > 0.01


@pytest.mark.slow  # by the fixture
def test_what_the_config_says_and_that_a_missing_member_is_seen(written: Any, tmp_path: Path) -> None:
    root, fused_models = written
    model = fused_models["llama-mixed"]
    plan = ExportPlan.of(model)
    shutil.copytree(root / "llama-mixed", tmp_path / "out")
    assert plan.config == json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan.config["per_layer_config"] == {
        "0": {"further": [{"intermediate_size": 96, "skip": ["input_layernorm", "self_attn"]}]},
        "1": {"skip": ["mlp", "post_attention_layernorm"]},
        "2": {
            "intermediate_size": 96,
            "further": [{"intermediate_size": 48, "skip": ["input_layernorm", "self_attn"]}],
        },
    }
    assert plan.config["num_hidden_layers"] == 3 and plan.config["model_type"] == "fused_llama"
    kept = FusionPlan.load(tmp_path / "out" / "fxfusion_plan.yaml")
    assert kept.groups == MIXED.groups and kept.dropped_attention == MIXED.dropped_attention
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.further.0.mlp.down_proj.weight"][:, 48:] = 0
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="tensors and settings fit, but the logits are off by"):
        prove(model, plan.stack, tmp_path / "out", "modeling_fused", "FusedLlamaForCausalLM")


# --- what is refused ------------------------------------------------------------------------------------


def mixed_dtypes(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.bfloat16()


def width(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 32))


def unequal_heads(model: Any) -> None:
    model.model.layers[3].self_attn.k_proj.weight = nn.Parameter(torch.zeros(24, 32))


def scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.5


def activation(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = nn.GELU()


def hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, found: 2 * found)


def other_class(model: Any) -> None:
    class Mine(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Mine


def other_layer(model: Any) -> None:
    class Mine(type(model.model.layers[0])):  # type: ignore[misc]
        pass

    model.model.layers[3].__class__ = Mine


def own_settings(model: Any) -> None:
    model.config.per_layer_config = {1: {"intermediate_size": 64}}


REFUSED = [
    (mixed_dtypes, r"one dtype: .* is torch.float32, model.layers.2.mlp.up_proj.weight is torch.bfloat16"),
    (width, r"layer 1: mlp.up_proj.weight is \[40, 32\], and no setting of LlamaConfig gives .*would be \[48, 32\]"),
    (unequal_heads, r"layer 3: self_attn.k_proj.weight is \[24, 32\], and no setting of LlamaConfig"),
    (scale, r"model.layers.1.self_attn.scaling is 0.5, and 0.35\d* as the config builds it"),
    (activation, r"model.layers.2.mlp.act_fn.*GELU|model.layers.2.mlp.act_fn.approximate"),
    (hook, "tensors and settings fit, but the logits are off by"),
    (other_class, "names classes of transformers, and .*Mine is none"),
    (other_layer, "one class for all layers; model.layers has LlamaDecoderLayer and Mine"),
    (own_settings, "has a per_layer_config of its own"),
    (lambda model: model.to("meta"), "on the meta device: there are no weights to write"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_what_cannot_be_said_is_refused_and_nothing_is_written(change: Any, reason: str, tmp_path: Path) -> None:
    model = models.intact()
    save(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change(model)
    with pytest.raises(CheckpointError, match=reason):
        save(model, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow  # 10 s: drops and fuses
def test_layers_that_have_no_place_are_named(tmp_path: Path) -> None:
    model = fxfusion.drop_attention(models.intact(), [0])
    with pytest.raises(CheckpointError, match=r"model.layers.0 has no attention, and no layer with attention stands"):
        ExportPlan.of(model)
    model = decoder(family_named("gpt2"))
    fxfusion.fuse(model, {"groups": [{"members": [1, 2], "mixers": "wide"}]})
    with pytest.raises(CheckpointError, match=r"layer 1: attn.c_attn.weight is \[32, 192\], and no setting of"):
        ExportPlan.of(model)


@pytest.mark.slow  # by the fixture
@pytest.mark.parametrize("case", CASES)
def test_fxfusion_reads_it_back_without_its_code(written: Any, case: str, tmp_path: Path) -> None:
    root, fused_models = written
    shutil.copytree(root / case, tmp_path / "out")
    (tmp_path / "out" / "modeling_fused.py").write_text("raise SystemExit('this code was run')\n")
    model, again, tokens = fused_models[case], fxfusion.from_pretrained(tmp_path / "out"), token_ids()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        found = again(tokens, use_cache=False).logits
    assert off(found.tolist(), expected.tolist()) < LIMIT
    assert type(again) is type(model) and sum(map(torch.numel, again.parameters())) == sum(
        map(torch.numel, model.parameters())
    )
    steps: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens, **steps), model.generate(tokens, **steps))
    assert again.config.model_type == load_config(tmp_path / "out").model_type == model.config.model_type
    file = tmp_path / "out" / "model.safetensors"
    values = load_file(file)
    name = next(name for name, value in values.items() if ".further." in name or value.dim() > 1)
    save_file(values | {name: values[name] * 2}, file, {"format": "pt"})
    with torch.no_grad():
        changed = fxfusion.from_pretrained(tmp_path / "out")(tokens, use_cache=False).logits
    assert off(changed.tolist(), expected.tolist()) > LIMIT


def test_a_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not replaced"):
        fxfusion.save_pretrained(models.intact(), tmp_path / "out", "transformers")
    shutil.rmtree(tmp_path / "out")
    with pytest.warns(UserWarning, match="no tokenizer"):
        fxfusion.save_pretrained(models.intact(), tmp_path / "out", "transformers")
    assert (
        (tmp_path / "out" / "modeling_fused.py").read_text().startswith('"""LlamaForCausalLM with layers that differ')
    )
