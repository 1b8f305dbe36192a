"""What a step computes: tables as they are, with attention dropped, FFNs fused or split, mixers moved."""

from __future__ import annotations

from typing import Any

import pytest

from fxfusion.cost.layer_table import Layer, LayerTable
from fxfusion.cost.sublayers import Attention, Ffn, Step, arrange, equal_parts
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import MixerMode, PlannedGroup


def table(text: str, **fields: Any) -> LayerTable:
    """`"A4 4 A4 -"`: layers with attention (A) and an FFN of that width; `-` is padding."""
    layers = []
    for word in text.split():
        width = word.strip("A-")
        layers.append(Layer(has_mixer="A" in word, ffn_width=int(width) if width else None))
    given = {"num_attention_heads": 8, "num_key_value_heads": 2} | fields
    return LayerTable(name="test", hidden_size=64, layers=tuple(layers), **given)


def shown(step: Step) -> str:
    """`"A 4 A2 [12]"`: attention, an FFN, two attentions as one, an FFN made of several."""
    words = []
    for part in step.sublayers:
        if isinstance(part, Attention):
            merged = sum(kind.merged for kind in part.kinds)
            words.append("A" if merged == 1 else f"A{merged}")
        else:
            words.append(str(part.width) if part.members == 1 else f"[{part.width}]")
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("A4 4 - A4", {}, "A 4 4 A 4"),
        ("A4 4 - 4 4 A4", {"groups": [range(1, 5)]}, "A 4 [12] A 4"),  # padding inside
        ("A4 4 4", {"groups": [range(0, 3)]}, "A [12]"),  # a leading member: its attention goes before
        ("A 4 4 4 -", {"groups": [(1, 3)], "unfuse": {2: 1}}, None),
        ("A4 12 4", {"unfuse": {1: 3}}, "A 4 4 4 4 4"),
        ("A4 12 4", {"unfuse": {1: 3}, "groups": [(1, 2)]}, "A 4 [16]"),
        ("A4 A4 A4", {"plan": FusionPlan(dropped_attention=[1, 2], groups=[[1, 2]])}, "A 4 [8]"),
        ("A4 A4 A4", {"plan": FusionPlan(groups=[[0, 1]], hoist=True)}, "A A [8] A 4"),
        ("A4 A4 A4", {"groups": [PlannedGroup((0, 1, 2), "wide")]}, "A3 [12]"),
        (
            "A4 A4 A4",
            {"plan": FusionPlan(dropped_attention=[0], groups=[{"members": [1, 2], "mixers": "wide"}])},
            "4 A2 [8]",
        ),
        ("A4 A5 A6", {"plan": FusionPlan(removed=[1])}, "A 4 A 6"),
        ("A4 A5 A6 A4", {"plan": FusionPlan(removed=[0, 3], groups=[[1, 2]], hoist=True)}, "A A [11]"),
        ("A4 4 4", {"groups": [["model.layers.1.mlp", "model.layers.2.mlp"]]}, "A 4 [8]"),
    ],
)
def test_arrangements(text: str, options: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        with pytest.raises(OptionError, match="group 1-3: layer 2 lies between its members and is none of them"):
            arrange(table(text), **options)
    else:
        assert shown(arrange(table(text), **options)) == expected


def test_merged_attentions_lie_side_by_side() -> None:
    step = arrange(table("A4 A4", head_dim=16), groups=[PlannedGroup((0, 1), "wide")])
    assert step.attentions == (Attention(heads=16, kv_heads=4, head_dim=16, merged=2),)
    assert step.attentions[0].layers == step.ffns[0].layers == (0, 1)


def test_attentions_that_differ_are_one_sublayer_of_two_kinds() -> None:
    layers = [Layer(has_mixer=True, ffn_width=4, window=window) for window in (None, 32, 32)]
    mixed = table("A4").model_copy(update={"layers": tuple(layers)})
    step = arrange(mixed, groups=[PlannedGroup((0, 1, 2), "wide")])
    assert shown(step) == "A3 [12]" and step.attentions[0].layers == (0, 1, 2)
    assert [(kind.merged, kind.window) for kind in step.attentions[0].kinds] == [(1, None), (2, 32)]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("mixers", "after"), [("hoist", lambda n: n + 1), ("wide", lambda n: 2)])
def test_a_window_has_fewer_sublayers_than_its_layers(count: int, mixers: MixerMode, after: Any) -> None:
    plan = FusionPlan(groups=[{"members": list(range(1, 1 + count)), "mixers": mixers}])
    decoder = table(" ".join(["A4"] * (count + 2)))
    step = arrange(decoder, plan)
    (window,) = step.windows
    assert (window.mixers, window.before, window.after) == (mixers, 2 * count, after(count))
    assert window.layers == tuple(range(1, 1 + count))
    saved = len(arrange(decoder).sublayers) - len(step.sublayers)
    assert saved == window.before - window.after > 0


def test_only_groups_whose_mixers_move_are_windows() -> None:
    plan = FusionPlan(dropped_attention=[1], groups=[[0, 1], {"members": [2, 3], "mixers": "hoist"}])
    step = arrange(table("A4 A4 A4 A4"), plan)
    assert [window.layers for window in step.windows] == [(2, 3)]
    assert arrange(table("A4 A4")).windows == ()
    nothing = arrange(table("A4 4"), groups=[PlannedGroup((0, 1), "hoist")])
    assert shown(nothing) == "A [8]" and nothing.windows == (), "the attention stands before its FFNs already"


def test_sizes() -> None:
    layers = (Layer(has_mixer=True, ffn_width=None, num_key_value_heads=4), Layer(has_mixer=True, ffn_width=6))
    found = arrange(table("A4", gated=False).model_copy(update={"layers": layers}))
    assert found.attentions[0] == Attention(heads=8, kv_heads=4, head_dim=8)
    assert found.attentions[1] == Attention(heads=8, kv_heads=2, head_dim=8)
    assert found.ffns == (Ffn(width=6, gated=False),)
    plain = arrange(table("A4", num_key_value_heads=None))
    assert plain.attentions[0].kv_heads == 8


@pytest.mark.parametrize(
    ("width", "count", "expected"),
    [
        (399360, 8, (49920,) * 8),
        (343040, 15, (23040,) * 5 + (22784,) * 10),
        (301056, 14, (21504,) * 14),
        (10, 3, (4, 4, 2)),
        (3, 3, (1, 1, 1)),
    ],
)
def test_equal_parts(width: int, count: int, expected: tuple[int, ...]) -> None:
    found = equal_parts(width, count)
    assert found == expected and sum(found) == width


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("A4 4 A4 4", {"groups": [(1, 2, 3)]}, "group 1-3: the attention of layer 2 lies between its FFNs"),
        ("A4 4 4", {"groups": [range(1, 4)]}, "layer 3 does not exist: test has 3 layers"),
        ("A4 4 4", {"groups": [(-1, 1)]}, "layer -1 does not exist"),
        ("A4 4 - -", {"groups": [range(1, 4)]}, "group 1-3: it has 1 FFN; a group needs at least two"),
        ("A4 - -", {"groups": [(1, 2)]}, "group 1-2: it has 0 FFNs"),
        ("A4 4 4 4", {"groups": [(1, 2), (2, 3)]}, "group 2-3: a layer of it is named twice, or in another group too"),
        ("A4 4 4 4", {"groups": [(1, 3)]}, "group 1-3: layer 2 lies between its members and is none of them"),
        ("A4 4", {"groups": [["mlp", "model.layers.1.mlp"]]}, "group member 'mlp': no layer number in it"),
        ("A4 4", {"groups": [[]]}, "a group without layers"),
        ("A4 - 4", {"unfuse": {1: 2}}, "unfuse: layer 1 has no FFN"),
        ("A4 4", {"unfuse": {7: 2}}, "layer 7 does not exist"),
        ("A4 4", {"unfuse": {1: 5}}, "unfuse: layer 1: expected 1 to 4 members"),
        ("A4 4", {"unfuse": {1: 0}}, "unfuse: layer 1: expected 1 to 4 members"),
        ("A4 -", {"plan": FusionPlan(dropped_attention=[1])}, "layer 1: there is no attention to drop"),
        ("A4 -", {"plan": FusionPlan(removed=[1])}, "layer 1: there is nothing to remove"),
        ("A4 A4", {"plan": FusionPlan(removed=[2])}, "layer 2 does not exist"),
    ],
)
def test_what_cannot_be_arranged(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        arrange(table(text), **options)


def test_attention_of_unknown_heads() -> None:
    with pytest.raises(OptionError, match="test: num_attention_heads is not known, and layer 1 has attention"):
        arrange(table("4 A4", num_attention_heads=None))
