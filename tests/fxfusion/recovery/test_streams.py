"""Rows of two models: what a layer reads and lacks, with streams that are kept or not, and values that are broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfusion
from fxfusion.analysis.batches import read_batches
from fxfusion.errors import FxFusionError
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.models.traced import TracedModel
from fxfusion.recovery.projections import Projection, choose, find_projections
from fxfusion.recovery.streams import Streams
from tests.fxfusion.recovery.own_text import DROPPED, PLAN, model_of, own_text


def prepared() -> tuple[Any, TracedModel, TracedModel, list[Projection]]:
    """The fused model, itself and the intact one as graphs, and all projections that a refit would change."""
    fused = fxfusion.fuse(model_of(), PLAN)
    traced, intact = TracedModel(fused), TracedModel(model_of())
    state = fused_state(fused)
    assert state is not None
    found = find_projections(fused, traced.graph(own_text()[0]), state.recipe)
    return fused, traced, intact, choose(found, DROPPED, "all")


def test_kept_streams_change_no_value_and_broken_ones_are_named() -> None:
    fused, traced, intact, projections = prepared()
    batches, steps = read_batches(own_text()[:2]), []
    kept = Streams(traced, intact, batches, 2**30, steps.append)
    anew = Streams(traced, intact, batches, 0)
    for projection in projections:
        for one, other in zip(kept.rows(projection), anew.rows(projection), strict=True):
            assert torch.equal(one.inputs, other.inputs) and torch.equal(one.lacking, other.lacking)
            assert one.inputs.shape == (16 * 24, projection.width) and one.lacking.shape == (16 * 24, 32)
            assert one.size == other.size > 0
    assert steps == [1] * 2 * len(projections) and any(kept._own.kept) and not any(anew._own.kept)
    with torch.no_grad():
        fused.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FxFusionError, match="model.layers.1.mlp.down_proj: the .* is not finite in batch 0"):
        list(anew.rows(projections[0]))


def test_projections_are_found_in_order_and_by_what_is_asked_for() -> None:
    fused, traced, _, projections = prepared()
    assert [(one.kind, one.layer, one.until, one.members) for one in projections] == [
        ("ffn", 1, 2, (1, 2)),
        ("attention", 3, 3, ()),
        ("ffn", 3, 3, ()),
    ]
    state = fused_state(fused)
    assert state is not None
    every = find_projections(fused, traced.graph(own_text()[0]), state.recipe)
    assert [one.layer for one in every] == [0, 0, 1, 3, 3]
    assert [one.layer for one in choose(every, DROPPED, "none")] == [1]
    assert [one.kind for one in choose(every, DROPPED, "ffn")] == ["ffn", "ffn"]
    assert choose([one for one in every if not one.members], (), "all") == []


@torch.no_grad()
def test_the_target_of_a_wide_blocks_attention() -> None:
    """What comes before the window in the reference, and what each of its attentions adds there, by hooks."""
    fused = fxfusion.fuse(model_of(), {"groups": [{"members": [1, 2], "mixers": "wide"}]})
    intact, state = model_of(), fused_state(fused)
    ids = own_text()[0]
    assert state is not None
    traced = TracedModel(fused)
    projection, *_ = choose(find_projections(fused, traced.graph(ids), state.recipe), (), "none")
    assert (projection.kind, projection.layer, projection.members) == ("attention", 2, (1, 2))
    (rows,) = Streams(traced, TracedModel(intact), read_batches([ids]), 2**30).rows(projection)
    seen: dict[str, torch.Tensor] = {}
    layers = intact.model.layers
    layers[1].input_layernorm.register_forward_pre_hook(lambda _, given: seen.update(before=given[0]))
    for number in (1, 2):
        layers[number].self_attn.register_forward_hook(
            lambda _, given, output, number=number: seen.update({f"attention {number}": output[0]})
        )
    fused.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _, given: seen.update(now=given[0]))
    intact(ids), fused(ids)
    lacking = seen["before"] + seen["attention 1"] + seen["attention 2"] - seen["now"]
    assert torch.allclose(rows.lacking, lacking.reshape(-1, 32), atol=1e-5) and float(lacking.abs().max()) > 0.01
    one = seen["before"] + seen["attention 1"] - seen["now"]
    assert not torch.allclose(rows.lacking, one.reshape(-1, 32), atol=1e-3)
