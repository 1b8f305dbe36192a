"""The arena: each rival's choice by its paper's rule in eager PyTorch, and what is measured of it."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfusion
from fxfusion.analysis.quality import evaluate
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.arena import METHODS, RIVALS, Arena, ArenaOptions, compare, divided
from fxfusion.planning.comparison import Comparison, Entrant
from tests.fxfusion.analysis.test_probes import ByCharacter
from tests.fxfusion.models.ffn_surgery.test_remove import without
from tests.fxfusion.recovery.own_text import model_of, own_text

pytestmark = pytest.mark.slow
DEPTH = 2
FEWER = 4 - DEPTH


@lru_cache
def arena() -> Arena:
    return Arena(model_of(), own_text(), ArenaOptions(depths=(DEPTH,), max_window=2))


@lru_cache
def comparison() -> Comparison:
    return compare(model_of(), own_text(), depths=[3, DEPTH], max_window=2, generate=2, new_tokens=3)


def loss(model: Any, batches: Any) -> float:
    return float(evaluate(model, batches, resamples=100).loss)


@torch.no_grad()
def streams(tokens: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of the intact Llama: the stream before each layer and after the last, after each attention; what FFNs add."""
    model = model_of()
    found = list(model.model(tokens, output_hidden_states=True).hidden_states)
    last: list[Tensor] = []
    middle: list[Tensor] = []
    adds: list[Tensor] = []
    hooks = [model.model.layers[-1].register_forward_hook(lambda _, __, out: last.append(_first(out)))]
    for layer in model.model.layers:
        norm = layer.post_attention_layernorm
        hooks.append(norm.register_forward_pre_hook(lambda _, given: middle.append(given[0])))
        hooks.append(layer.mlp.register_forward_hook(lambda _, __, out: adds.append(out)))
    model.model(tokens)
    for hook in hooks:
        hook.remove()
    return [*found[:-1], last[0]], middle, adds


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def turns(kind: str) -> list[float]:
    """1 - cos of each layer's block, attention or FFN on the calibration text."""
    fitted, _ = divided(own_text())
    pairs: list[list[Tensor]] = [[] for _ in range(4)]
    for tokens in fitted:
        before, middle, adds = streams(tokens)
        for layer in range(4):
            ends = {
                "block": (before[layer], before[layer + 1]),
                "attention": (before[layer], middle[layer]),
                "ffn": (middle[layer], middle[layer] + adds[layer]),
            }[kind]
            pairs[layer].append((1 - F.cosine_similarity(*ends, dim=-1)).flatten())
    return [float(torch.cat(one).mean()) for one in pairs]


def cheapest(kind: str, count: int) -> list[int]:
    found = turns(kind)
    return sorted(sorted(range(4), key=found.__getitem__)[:count])


def test_shortgpt_removes_the_blocks_of_least_influence() -> None:
    assert list(arena().entrant("shortgpt", DEPTH).plan.removed) == cheapest("block", FEWER)


def test_sleb_removes_one_block_after_the_other() -> None:
    fitted, _ = divided(own_text())
    gone: list[int] = []
    for _ in range(FEWER):
        left = [layer for layer in range(4) if layer not in gone]
        gone.append(min(left, key=lambda layer: loss(without(model_of(), *gone, layer), fitted)))
    assert list(arena().entrant("sleb", DEPTH).plan.removed) == sorted(gone)


def test_llm_drop_drops_the_attention_that_turns_least() -> None:
    found = arena().entrant("llm-drop", DEPTH)
    count = len(found.plan.dropped_attention)
    assert list(found.plan.dropped_attention) == cheapest("attention", count) and not found.plan.removed
    fewer = FusionPlan(dropped_attention=cheapest("attention", count - 1)) if count > 1 else FusionPlan()
    bound = arena().latency(arena().entrant("pairs", DEPTH))
    assert arena().latency(found) <= bound < arena().latency(type(found)("one less", fewer))


def test_ffns_go_that_turn_least() -> None:
    found = arena().entrant("ffn-drop", DEPTH)
    assert list(found.ffns) == cheapest("ffn", FEWER) and found.plan.changes_nothing
    model, tokens = model_of(), own_text()[0]
    for layer in found.ffns:
        model.model.layers[layer].mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    with torch.no_grad():
        wanted = model(tokens).logits
    assert torch.allclose(arena().model_of(found)(tokens), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_pairs_are_the_run_that_costs_least() -> None:
    arena_of_one = Arena(model_of(), own_text(), ArenaOptions(depths=(3,)))
    found = arena_of_one.entrant("pairs", 3)
    fitted, _ = divided(own_text())
    plans = [FusionPlan(groups=[{"members": [first, first + 1], "mixers": "wide"}]) for first in range(3)]
    losses = [loss(fxfusion.fuse(model_of(), plan), fitted) for plan in plans]
    assert found.plan == plans[losses.index(min(losses))]


def test_replaceme_puts_a_map_in_place_of_the_flattest_run() -> None:
    """The map goes into the down projection of the layer before the run, by hand."""
    found = arena().entrant("replaceme", DEPTH)
    fitted, _ = divided(own_text())
    seen = [streams(tokens) for tokens in fitted]
    flat = {
        first: float(
            torch.cat([1 - F.cosine_similarity(x[first], x[first + FEWER], dim=-1) for x, _, _ in seen]).mean()
        )
        for first in (1, 2)
    }
    first = min(flat, key=flat.__getitem__)
    assert found.mapped and list(found.plan.removed) == [first, first + 1]
    adds = torch.cat([adds[first - 1].flatten(0, 1) for _, _, adds in seen]).double()
    lacks = torch.cat([(x[first + FEWER] - middle[first - 1]).flatten(0, 1) for x, middle, _ in seen]).double()
    matrix = torch.linalg.lstsq(adds, lacks).solution
    model = without(model_of(), *found.plan.removed)
    down = model.model.layers[first - 1].mlp.down_proj
    with torch.no_grad():
        down.weight.copy_((matrix.T @ down.weight.double()).float())
        wanted = model(own_text()[0]).logits
    logits = arena().model_of(found)(own_text()[0])
    assert torch.allclose(logits, wanted, atol=1e-3 * float(wanted.abs().max()))


def test_every_method_has_a_cell_at_every_depth() -> None:
    found = comparison()
    assert [(cell.method, cell.depth) for cell in found.cells] == [(method, d) for d in (3, 2) for method in METHODS]
    assert not [cell.problem for cell in found.cells if cell.problem]
    for cell in found.cells:
        assert cell.ffns == (4 if cell.method == "llm-drop" else cell.depth)
        assert cell.latency_ms is not None and cell.latency_ms < found.latency_ms
        assert cell.value("kl") is not None and cell.agreement is not None and 0 <= cell.agreement <= 1
        assert cell.probes is None
    mixed, alone = (
        [cell.value("loss_increase") for cell in found.cells if cell.method in names]
        for names in (("mixed",), ("drop", "hoist", "wide", "remove"))
    )
    assert len(mixed) == 2 and len(alone) == 8
    assert set(found.best) == {3, 2}
    for depth, best in found.best.items():
        at = [cell.value("kl") for cell in found.cells if cell.depth == depth and cell.ffns == depth]
        assert best.value("kl") == min(one for one in at if one is not None)


def test_a_removed_plan_is_measured_as_the_smaller_model(tmp_path: Path) -> None:
    """On the text that judges, raw and refitted; and a second call measures nothing."""
    model, (fitted, judged) = model_of(), divided(own_text())
    options: dict[str, Any] = {"depths": (3,), "methods": ("shortgpt", "ffn-drop"), "refit": True}
    first = Arena(model, own_text(), ArenaOptions(**options), folder=tmp_path)
    chosen = Entrant("shortgpt", FusionPlan(removed=[1]))  # what an earlier call chose
    first.store.data["entrants"] = {"shortgpt 3": chosen.to_dict()}
    found, options = first.run(), {**options, "cache": tmp_path}
    raw, repaired, ffns = found.cells
    assert (raw.name, repaired.name, ffns.name) == ("shortgpt", "shortgpt + refit", "ffn-drop")
    assert raw.entrant == repaired.entrant == chosen, repaired.problem
    smaller = without(model_of(), 1)
    assert raw.value("loss") == pytest.approx(loss(smaller, judged), rel=1e-4)
    by_hand = fxfusion.refit(model_of(), chosen.plan, fitted, reference="intact")
    assert repaired.value("loss") == pytest.approx(loss(by_hand, judged), rel=1e-4)
    assert repaired.value("loss") < raw.value("loss")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxfusion.planning.arena.evaluate", lambda *_, **__: pytest.fail("measured again"))
        assert compare(model, own_text(), **options).to_dict() == found.to_dict()
    with pytest.raises(OptionError, match="another"):
        compare(model, own_text(seed=3), **options)


def test_probes_count_what_the_intact_model_can_do() -> None:
    class Words(ByCharacter):
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + one for one in super().__call__(text)["input_ids"]]}

    found = compare(model_of(), own_text(), depths=[3], methods=["shortgpt"], probes=1, tokenizer=Words())
    assert found.cells[0].probes is not None and set(found.cells[0].probes) >= {"copy", "all"}
    with pytest.raises(OptionError, match="need a tokenizer"):
        compare(model_of(), own_text(), depths=[3], probes=1)


def test_table_and_plot(tmp_path: Path) -> None:
    found = comparison()
    rows = list(csv.DictReader(found.to_csv(tmp_path / "table.csv").open()))
    assert [row["method"] for row in rows] == [cell.method for cell in found.cells]
    assert sum(int(row["lowest_kl"]) for row in rows) == 2
    assert float(rows[0]["kl"]) == pytest.approx(found.cells[0].value("kl"), rel=1e-5)
    assert found.plot(tmp_path / "plot.svg").read_text().count("shortgpt") >= 1
    assert len(found.curves()) == len(METHODS)
    (tmp_path / "other.csv").write_text("mine")
    with pytest.raises(OptionError):
        found.to_csv(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": []}, "different numbers of FFNs"),
        ({"depths": [3, 3]}, "different numbers of FFNs"),
        ({"depths": [4]}, "depths: 4 is not between 1 and 3: the model has 4 FFNs"),
        ({"depths": [0]}, "depths: 0 is not between"),
        ({"depths": [3], "methods": ["guess"]}, "expected some of drop, hoist, wide, remove, mixed, pairs"),
        ({"depths": [3], "methods": []}, "got none"),
        ({"depths": [3], "generate": -1}, "generate: expected"),
        ({"depths": [3], "hardware": "abacus"}, "abacus"),
        ({"depths": [3], "tp": 7}, "tp 7 does not divide"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compare(model_of(), own_text(), **options)


def test_too_little_text_and_what_cannot_be_had_are_said() -> None:
    with pytest.raises(OptionError, match="two batches"):
        compare(model_of(), own_text()[:1], depths=[3])
    found = compare(model_of(), own_text(), depths=[1], methods=["pairs", "shortgpt"])
    assert found.cells[0].problem == "3 pairs need 6 layers, the model has 4" and not found.cells[1].problem
    assert len(RIVALS) == 6
