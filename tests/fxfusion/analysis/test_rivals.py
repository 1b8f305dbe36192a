"""Rivals in the graph, against eager loops over the layers of a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfusion.analysis.planned import PlannedModel
from fxfusion.analysis.rivals import EditedModel, fit_linear_map, flattest_run, pairs_from, run_distances
from fxfusion.errors import OptionError
from fxfusion.models.traced import TracedModel
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.models import tiny
from tests.fxfusion.models.tiny import Causal, causal, token_ids
from tests.helpers import assert_exact
from tests.tiny_lm import TinyLm, ids

BATCHES = [token_ids(3, 6), token_ids(2, 8, seed=2)]


@torch.no_grad()
def streams(model: Causal, tokens: Tensor) -> list[Tensor]:
    """The stream before each layer and after the last."""
    found = [model.embed(tokens)]
    for layer in model.layers:
        found.append(layer(found[-1]))
    return found


@torch.no_grad()
def logits(model: Causal, tokens: Tensor, removed: Any = (), ffns: Any = (), mapped: Any = None) -> Tensor:
    x = model.embed(tokens)
    for number, layer in enumerate(model.layers):
        if number in removed:
            continue
        x = x + layer.mix(x)
        if number not in ffns:
            adds = layer.ffn(layer.norm(x))
            x = x + (adds @ mapped[1] if mapped and mapped[0] == number else adds)
    found: Tensor = model.head(model.norm(x))
    return found


@pytest.mark.parametrize(
    "parts", [{"removed": [1, 2]}, {"ffns": [0, 3]}, {"removed": [3], "ffns": [2, 1]}, {"mapped": 1, "removed": [2]}]
)
def test_an_edited_graph_is_the_loop_by_hand(parts: dict[str, Any]) -> None:
    model = causal(*[tiny.plain] * 4)
    if "mapped" in parts:
        hidden = model.embed.embedding_dim
        parts = parts | {"mapped": (parts["mapped"], torch.randn(hidden, hidden, dtype=torch.float64))}
    edited = EditedModel(TracedModel(model), **parts)
    for tokens in BATCHES:
        assert_exact(edited(tokens), logits(model, tokens, **parts), torch.float64)
        assert not torch.allclose(edited(tokens), logits(model, tokens), rtol=1e-2), "it changes the model"


@torch.no_grad()
def test_two_layers_in_parallel_are_a_wide_pair() -> None:
    """Both attentions read one stream, both FFNs the stream after both."""
    model, tokens = TinyLm(), ids()
    x = model.embedding(tokens)
    x = model.layers[0](x)
    for first in (1, 3):
        one, two = model.layers[first], model.layers[first + 1]
        after = x + (one.attention(x) - x) + (two.attention(x) - x)
        x = after + (one.mlp(after) - after) + (two.mlp(after) - after)
    wanted = model.head(model.layers[5](x))
    found = PlannedModel(TracedModel(model), pairs_from(1, 2))(tokens)
    assert_exact(found, wanted, torch.float64)
    assert not torch.allclose(found, model(tokens), rtol=1e-2)


def test_distances_of_runs_and_the_flattest_one() -> None:
    model = causal(*[tiny.plain] * 4)
    found = run_distances(TracedModel(model), BATCHES)
    seen = [streams(model, tokens) for tokens in BATCHES]
    for one in range(5):
        for other in range(5):
            turns = [1 - F.cosine_similarity(part[one], part[other], dim=-1).flatten() for part in seen]
            wanted = float(torch.cat(turns).mean()) if other > one else 0.0
            assert float(found[one, other]) == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    for length in (1, 2, 3):
        first = flattest_run(found, length)
        assert first >= 1 and all(found[first, first + length] <= found[at, at + length] for at in range(1, 5 - length))
    with pytest.raises(OptionError, match="a run of 4 layers cannot go"):
        flattest_run(found, 4)


def test_the_map_is_the_one_of_least_squares() -> None:
    model = causal(*[tiny.plain] * 4)
    long = [token_ids(16, 12, seed=seed) for seed in range(2)]
    found = fit_linear_map(TracedModel(model), long, 2, 2)
    adds, lacks = [], []
    with torch.no_grad():
        for tokens in long:
            x = streams(model, tokens)
            layer = model.layers[1]
            before = x[1] + layer.mix(x[1])
            adds.append(layer.ffn(layer.norm(before)).flatten(0, 1))
            lacks.append((x[4] - before).flatten(0, 1))
    wanted = torch.linalg.lstsq(torch.cat(adds), torch.cat(lacks)).solution
    assert torch.allclose(found.matrix, wanted, rtol=1e-3, atol=1e-4) and found.layers == (2, 3)

    def error(matrix: Tensor) -> float:
        return float((torch.cat(adds) @ matrix - torch.cat(lacks)).square().sum())

    assert error(found.matrix) < 0.9 * error(torch.eye(len(wanted), dtype=torch.float64))


def test_what_is_not_there_is_said() -> None:
    traced = TracedModel(causal(tiny.plain, tiny.attention_only, tiny.plain))
    with pytest.raises(OptionError, match="layer 1 has 0 FFNs"):
        EditedModel(traced, ffns=[1])(token_ids())
    with pytest.raises(OptionError, match=r"no residual block to remove in layers \[7\]"):
        EditedModel(traced, removed=[7])(token_ids())
    assert pairs_from(3, 1) == FusionPlan(groups=[{"members": [3, 4], "mixers": "wide"}])
