"""A fused model on two devices: same logits, one all-reduce for each fused group, a slice of every member on each.

The examples themselves run, in two processes with gloo. Which channels a process holds is read off its weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fxfusion
from fxfusion.checkpoints.nemotron_nas.export import save
from fxfusion.errors import SurgeryError
from tests.end_to_end import caching
from tests.end_to_end.family_table import family_named
from tests.end_to_end.torchrun import torchrun

LIMIT = 1e-5
MEMBERS = [1, 2, 3]
PLAN = fxfusion.FusionPlan(dropped_attention=MEMBERS, groups=[MEMBERS])
ONE = {"forward": 1, "backward": 1}
PACKED = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}


def intact(family: str, width: int) -> Any:
    """Four layers, hidden 32, attention and FFN in each."""
    return caching.decoder(family_named(family), intermediate_size=width)


def checkpoint(model: Any, folder: Path) -> tuple[str, str]:
    """The model as plain transformers saves it, and the plan; both as paths."""
    model.save_pretrained(folder)
    PLAN.save(folder / "plan.yaml")
    return str(folder), str(folder / "plan.yaml")


def members(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Gate with the norm's gain folded in, and down, of each member: `[width, hidden]` and `[hidden, width]`."""
    found = []
    for layer in (model.model.layers[number] for number in MEMBERS):
        packed = getattr(layer.mlp, "gate_up_proj", None)
        gate = layer.mlp.gate_proj.weight if packed is None else packed.weight.chunk(2)[0]
        found.append(((gate * layer.post_attention_layernorm.weight).detach(), layer.mlp.down_proj.weight.detach()))
    return found


def held(gate: Tensor, down: Tensor, whole: Sequence[tuple[Tensor, Tensor]]) -> list[set[int]]:
    """Which channels of each member a slice of the wide FFN has. `gate` `[n, hidden]`, `down` `[hidden, n]`."""
    found: list[set[int]] = [set() for _ in whole]
    for channel in range(gate.shape[0]):
        (match,) = [
            (member, int(own))
            for member, (rows, columns) in enumerate(whole)
            for own in (rows == gate[channel]).all(1).nonzero()
            if torch.equal(columns[:, own].flatten(), down[:, channel])
        ]
        found[match[0]].add(match[1])
    return found


def check_slices(parts: Sequence[tuple[Tensor, Tensor]], model: Any, width: int) -> None:
    """Each part has about as much of every member, and all parts together have all of it, once."""
    by_part = [held(gate, down, members(model)) for gate, down in parts]
    for member in range(len(MEMBERS)):
        sizes = [len(part[member]) for part in by_part]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == width
        assert set().union(*(part[member] for part in by_part)) == set(range(width))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "width", "by", "styles"),
    [("llama", 37, "transformers", {}), ("llama", 48, "torch", {}), ("phi3", 48, "transformers", PACKED)],
    ids=["widths-that-do-not-divide", "plain-torch", "packed"],
)
def test_the_example_gives_the_logits_of_one_process_with_one_all_reduce_for_a_group(
    family: str, width: int, by: str, styles: dict[str, str], tmp_path: Path
) -> None:
    model = intact(family, width)
    folder, plan = checkpoint(model, tmp_path / "model")
    options = ["--by", by, "--styles", json.dumps(styles), "--save-slices", str(tmp_path)]
    found = torchrun("examples/tensor_parallel.py", folder, "--plan", plan, *options)

    assert found["fused"]["logits_off"] <= LIMIT and found["gradients_off"] <= 2 * LIMIT
    assert found["unfused"]["logits_off"] > caching.RED
    assert found["unfused"]["all_reduces_of_each_ffn"] == [ONE] * 4
    assert found["fused"]["all_reduces_of_each_ffn"] == [ONE] * 2  # layer 0 keeps its own
    for way in ("forward", "backward"):
        saved = found["unfused"]["all_reduces"][way] - found["fused"]["all_reduces"][way]
        assert saved == len(MEMBERS) - 1, way

    parts = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    packed = "gate_up_proj" if family == "phi3" else "gate_proj"
    gates = [part[f"model.layers.1.mlp.{packed}.weight"] for part in parts]
    gates = [gate.chunk(2)[0] if family == "phi3" else gate for gate in gates]
    downs = [part["model.layers.1.mlp.down_proj.weight"] for part in parts]
    check_slices(list(zip(gates, downs, strict=True)), model, width)


@pytest.mark.slow
def test_an_exported_model_is_cut_by_transformers_alone(tmp_path: Path) -> None:
    model = fxfusion.fuse(intact("llama", 256), PLAN, shards=2)
    save(model, tmp_path / "model")
    modules = str(tmp_path / "modules")
    found = torchrun("examples/load_on_many_devices.py", str(tmp_path / "model"), HF_MODULES_CACHE=modules)
    assert found["logits_off"] <= LIMIT and found["same_text"]
    assert found["all_reduces"] == 4  # embedding, one attention, two FFNs
    assert found["parameters_held"] < 0.52 * found["parameters"]


def halves(model: Any) -> list[tuple[Tensor, Tensor]]:
    """The fused FFN's gate and down, each cut in two as tensor parallelism does."""
    ffn = model.model.layers[1].mlp
    return list(zip(ffn.gate_proj.weight.chunk(2), ffn.down_proj.weight.chunk(2, dim=1), strict=True))


@pytest.mark.slow
def test_without_shards_a_half_lacks_members_and_unfuse_undoes_both_orders_exactly() -> None:
    model = intact("llama", 48)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = PLAN.replace(norm="last")
    for shards in (1, 2):
        fused = caching.decoder(family_named("llama"), intermediate_size=48)
        fxfusion.fuse(fused, plan, shards=shards)
        assert fused.config.fxfusion["fused"].get("shards", 1) == shards
        whole = [(layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight) for layer in model.model.layers[1:]]
        found = [[len(own) for own in held(gate, down, whole)] for gate, down in halves(fused)]
        assert found == ([[48, 24, 0], [0, 24, 48]] if shards == 1 else [[24, 24, 24], [24, 24, 24]])
        fxfusion.unfuse(fused)
        assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize("shards", [0, True, 1.5])
def test_shards_that_are_no_number_of_devices_are_refused(shards: Any) -> None:
    with pytest.raises(SurgeryError, match="shards must be a whole number"):
        fxfusion.fuse(torch.nn.Linear(1, 1), PLAN, shards=shards)
