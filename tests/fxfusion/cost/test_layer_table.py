"""Layer tables: the published ones, their runs, and the paper's plans for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fxfusion import explain
from fxfusion.cost.layer_table import Layer, LayerTable, Run, paper_plan, published_tables, runs
from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from tests.blocks import Attention, Block, Gated, Rms, Stack, randomise, tokens

# Widths that add up to those of the four fused FFNs. Published are the sums and the widths that occur; which member
# has which is not.
ULTRA_FUSED = {
    125: [53248] * 7 + [26624],
    134: [53248] * 4 + [26624] * 8,
    143: [26624] * 4 + [21504] * 11,
    149: [21504] * 14,
}
ULTRA_GROUPS = [range(66, 74), range(74, 86), range(86, 101), range(101, 115)]


def table(text: str, hidden: int = 10, **fields: Any) -> LayerTable:
    """`"A4 4 A4 -"`: layers with attention (A) and an FFN of that width; `A` has no FFN, `-` is padding."""
    layers = []
    for word in text.split():
        width = word.strip("A-")
        layers.append(Layer(has_mixer="A" in word, ffn_width=int(width) if width else None))
    return LayerTable(name="test", hidden_size=hidden, layers=tuple(layers), **fields)


def original_ultra() -> LayerTable:
    """The 126 layers before fusing: the shipped ones without padding, each fused FFN as its members."""
    shipped = LayerTable.published("nemotron-ultra-253b")
    layers: list[Layer] = []
    for slot, layer in enumerate(shipped.layers):
        if slot in ULTRA_FUSED:
            layers += [Layer(has_mixer=False, ffn_width=width) for width in ULTRA_FUSED[slot]]
        elif layer.has_mixer or layer.ffn_width is not None:
            layers.append(layer)
    return shipped.model_copy(update={"layers": tuple(layers), "fused_slots": {}})


def lengths(plan: FusionPlan, from_layer: int = 0) -> list[int]:
    return [len(group) for group in plan.groups if int(group[0]) >= from_layer]


# --- published tables ---------------------------------------------------------------------------------


def test_the_tables_that_come_with_the_package() -> None:
    names = ("llama-3.1-405b", "llama-3.3-70b", "nemotron-super-49b", "nemotron-ultra-253b")
    assert published_tables() == names
    tables = [LayerTable.published(name) for name in names]
    assert [len(table.layers) for table in tables] == [126, 80, 80, 162]
    assert [sum(layer.has_mixer for layer in table.layers) for table in tables] == [126, 80, 49, 64]
    with pytest.raises(OptionError, match="no table 'gpt'; there are: llama-3.1-405b, llama-3.3-70b"):
        LayerTable.published("gpt")


def test_a_model_with_all_its_attention_has_no_runs() -> None:
    for name in ("llama-3.1-405b", "llama-3.3-70b"):
        full = LayerTable.published(name)
        assert runs(full) == () and paper_plan(full) == FusionPlan(norm="last")


def test_super_49b() -> None:
    given = LayerTable.published("nemotron-super-49b")
    assert runs(given) == (
        Run((6, 7), leading=5),
        Run((11,), leading=10),
        Run(tuple(range(42, 52)), leading=41),
        Run(tuple(range(53, 71)), leading=52),
    )
    plan = paper_plan(given)
    assert plan.groups == (tuple(range(42, 51)), tuple(range(53, 70))) and plan.norm == "last"
    assert plan.dropped_attention == (6, 7, 11, *range(42, 52), *range(53, 71))
    assert [sum(given.layers[layer].ffn_width or 0 for layer in group) for group in plan.groups] == [107_520, 87_808]


def test_super_49b_at_the_paper_s_third_step() -> None:
    """Table 3, step 3: 26 FFNs become 3, the second run in two."""
    plan = paper_plan(LayerTable.published("nemotron-super-49b"), splits=[61])
    assert lengths(plan) == [9, 8, 9]


def test_ultra_as_shipped_is_numbered_with_padding() -> None:
    shipped = LayerTable.published("nemotron-ultra-253b")
    assert [shipped.layers[slot].ffn_width for slot in ULTRA_FUSED] == [399_360, 425_984, 343_040, 301_056]
    assert {slot: sum(widths) for slot, widths in ULTRA_FUSED.items()} == {
        slot: shipped.layers[slot].ffn_width for slot in ULTRA_FUSED
    }
    assert {slot: text.split()[-1] for slot, text in shipped.fused_slots.items()} == {
        slot: f"{group[0]}-{group[-1]}" for slot, group in zip(ULTRA_FUSED, ULTRA_GROUPS, strict=True)
    }
    padding = [layer for layer in shipped.layers if not layer.has_mixer and layer.ffn_width is None]
    assert len(padding) == 81
    assert runs(shipped)[-1] == Run((125, 134, 143, 149, 150), leading=116)
    assert runs(shipped)[3] == Run(tuple(range(100, 107)), leading=98)


def test_original_ultra_by_splits() -> None:
    ultra = original_ultra()
    assert len(ultra.layers) == 126 and sum(layer.has_mixer for layer in ultra.layers) == 64
    assert runs(ultra)[-1] == Run(tuple(range(66, 116)), leading=65)
    assert ultra.without_mixer() == (24, 26, 51, 52, *range(54, 61), 64, *range(66, 116))
    plan = paper_plan(ultra, splits=[74, 86, 101])
    assert lengths(plan, from_layer=66) == [8, 12, 15, 14]
    assert plan.groups[-4:] == tuple(map(tuple, ULTRA_GROUPS))
    assert plan.groups[:-4] == (tuple(range(54, 60)),), "the shipped model leaves these alone"
    assert lengths(paper_plan(ultra), from_layer=66) == [49]


def test_no_memory_limit_cuts_ultra_like_the_paper() -> None:
    """Whatever the unknown widths: the third group has room for one more FFN where the second one fits."""
    shipped = LayerTable.published("nemotron-ultra-253b")
    widest = max(layer.ffn_width or 0 for slot, layer in enumerate(shipped.layers) if slot not in ULTRA_FUSED)
    second, third = (shipped.layers[slot].ffn_width or 0 for slot in (134, 143))
    assert third + widest < second
    ultra = original_ultra()
    sizes = [ultra.ffn_bytes(layer) for layer in range(66, 115)]
    limits = {sum(sizes[start:end]) for start in range(49) for end in range(start + 1, 50)}
    found = {tuple(lengths(paper_plan(ultra, max_bytes=limit), from_layer=66)) for limit in limits}
    assert (8, 12, 15, 14) not in found
    assert (8, 12, 18, 11) in found, "what a limit at which the second group fits comes to"


# --- runs and groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A4 A4", []),
        ("A4 4 4 A4", [((1, 2), 0)]),
        ("4 4 A4 4", [((0, 1), None), ((3,), 2)]),
        ("A4 4 - 4 - A4", [((1, 3), 0)]),
        ("A4 - 4 4", [((2, 3), 0)]),
        ("A 4 4", [((1, 2), None)]),
        ("A4 4 A 4", [((1,), 0), ((3,), None)]),
        ("- -", []),
        ("", []),
    ],
)
def test_runs(text: str, expected: list[tuple[tuple[int, ...], int | None]]) -> None:
    assert [(run.layers, run.leading) for run in runs(table(text))] == expected


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("A4 4 4 4 A4", [(1, 2)]),
        ("A4 4 4 A4", []),
        ("4 4 4", [(0, 1)]),
        ("A4 4 4 4 A4 4 4 4 4", [(1, 2), (5, 6, 7)]),
        ("A4 4 - 4 4", [(1, 3)]),
    ],
)
def test_paper_plan(text: str, groups: list[tuple[int, ...]]) -> None:
    plan = paper_plan(table(text))
    assert plan.groups == tuple(groups) and plan.norm == "last"
    assert plan.dropped_attention == table(text).without_mixer()


@pytest.mark.parametrize(
    ("max_bytes", "groups"),
    [
        (10**9, [(1, 2, 3, 4, 5)]),
        (1200, [(1, 2, 3, 4, 5)]),
        (1199, [(1, 2, 3, 4)]),
        (600, [(1, 2), (3, 4, 5)]),
        (599, [(2, 3, 4)]),  # 1 and 2 need 600, and 5 has nobody left to go with
        (360, [(2, 3), (4, 5)]),
        (120, []),
        (1, []),
    ],
)
def test_groups_fill_up_from_the_left(max_bytes: int, groups: list[tuple[int, ...]]) -> None:
    """Widths 8 2 4 2 4: in a hidden size of 10, with three matrices of 2 bytes, 60 bytes for each channel."""
    given = table("A9 8 2 4 2 4 9 A9")
    assert [given.ffn_bytes(layer) for layer in range(1, 6)] == [480, 120, 240, 120, 240]
    assert paper_plan(given, max_bytes=max_bytes).groups == tuple(groups)


def test_bytes_of_an_ffn() -> None:
    assert table("A3 -", gated=False).ffn_bytes(0, bytes_per_parameter=4) == 10 * 3 * 2 * 4
    assert table("A3 -").ffn_bytes(1) == 0
    half = table("A9 8 2 4 2 4 9 A9")
    assert paper_plan(half, max_bytes=600, bytes_per_parameter=1).groups == ((1, 2, 3, 4, 5),)


@pytest.mark.parametrize("splits", [[3], [2, 4], [2, 3, 4, 5]])
def test_splits(splits: Sequence[int]) -> None:
    ends = [1, *splits, 6]
    expected = [tuple(range(start, end)) for start, end in zip(ends, ends[1:], strict=False) if end - start > 1]
    assert paper_plan(table("A4 4 4 4 4 4 4"), splits=splits).groups == tuple(expected)


@pytest.mark.parametrize("layer", [0, 1, 6, 7, 99])
def test_a_split_that_splits_nothing(layer: int) -> None:
    with pytest.raises(PlanError, match=f"splits: layer {layer} is not inside a run of FFNs that could be fused"):
        paper_plan(table("A4 4 4 4 4 4 4"), splits=[3, layer])


def test_splits_and_memory_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="both given"):
        paper_plan(table("A4 4 4 4"), splits=[2], max_bytes=100)
    with pytest.raises(OptionError, match="max_bytes: expected at least 1, got 0"):
        paper_plan(table("A4 4 4 4"), max_bytes=0)


def test_the_plan_is_what_the_policy_of_that_name_finds() -> None:
    """A real model of that table: the compiler's own rule, from the graph, gives the same groups."""
    text = "A12 A12 12 12 12 12 A12 12 12 12 A12 12 12"
    blocks: list[Any] = []
    for word in text.split():
        ffn = Block(Rms(8), Gated())
        blocks.append(_Mixed(ffn) if word.startswith("A") else ffn)
    model = randomise(Stack(blocks))
    x = tokens()
    by_table = explain(model, x, plan=paper_plan(table(text))).groups
    by_policy = explain(model, x, policy="paper").groups
    assert [group.members for group in by_table] == [group.members for group in by_policy]
    assert [len(group.members) for group in by_table] == [3, 2]
    assert {group.norm for group in (*by_table, *by_policy)} == {"last"}


class _Mixed(Stack):
    """A decoder layer: attention, then an FFN."""

    def __init__(self, ffn: Block) -> None:
        super().__init__([])
        self.attention, self.ffn = Attention(), ffn

    def forward(self, x: Any) -> Any:
        return self.ffn(self.attention(x))


# --- reading ------------------------------------------------------------------------------------------


def test_a_table_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    fields = {"name": "mine", "hidden_size": 8, "blocks": [{"attention": True, "ffn_width": 4}] * 2}
    path.write_text(json.dumps(fields), "utf-8")
    assert LayerTable.read(path) == LayerTable(
        name="mine", hidden_size=8, layers=(Layer(has_mixer=True, ffn_width=4),) * 2
    )
    for change, message in (
        ({"hidden_size": 0}, "mine.json: hidden_size: Input should be greater than or equal to 1, got 0"),
        ({"hiden": 1}, "mine.json: unknown field 'hiden'"),
        ({"blocks": [{"attention": True}]}, r"mine.json: blocks\[0\].ffn_width: Field required"),
        (
            {"blocks": [{"attention": 1, "ffn_width": 4}]},
            r"mine.json: blocks\[0\].attention: Input should be a valid",
        ),
        ({"blocks": [{"attention": True, "ffn_width": -4}]}, r"mine.json: blocks\[0\].ffn_width: .* got -4"),
    ):
        path.write_text(json.dumps(fields | change), "utf-8")
        with pytest.raises(OptionError, match=message):
            LayerTable.read(path)
    path.write_text("{", "utf-8")
    with pytest.raises(OptionError, match="mine.json: not valid JSON"):
        LayerTable.read(path)
    with pytest.raises(OptionError, match="gone.json: cannot be read"):
        LayerTable.read(tmp_path / "gone.json")
