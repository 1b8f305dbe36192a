from __future__ import annotations

import inspect

import pytest

from fxfusion.cli.options import (
    GroupLimits,
    RoadOptions,
    read_bytes,
    read_drop,
    read_layers,
    read_roads,
    read_share,
    show_layers,
    show_members,
)
from fxfusion.errors import OptionError
from fxfusion.planning.make_plan import make_plan


@pytest.mark.parametrize(
    ("text", "layers"),
    [("4-6", [4, 5, 6]), ("8,10-11", [8, 10, 11]), ("3", [3]), (" 1 , 2 ", [1, 2]), ("5-5", [5])],
)
def test_layers_are_read_and_shown(text: str, layers: list[int]) -> None:
    assert read_layers(text, "--x") == layers
    assert read_layers(show_layers(layers), "--x") == layers


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1--2", "'1--2'"),
        ("4-x", "'4-x'"),
        ("", "''"),
        ("-3", "'-3'"),
        ("6-4", "backwards"),
        ("4-6,5", "5 is named twice"),
    ],
)
def test_what_are_no_layers_is_named_with_its_option(text: str, named: str) -> None:
    with pytest.raises(OptionError, match=f"--x.*{named}"):
        read_layers(text, "--x")


def test_members_are_shown_as_layers_where_they_are() -> None:
    assert show_members([4, 5, 6, 8]) == "4-6,8"
    assert show_members(["layers.4.mlp", 5]) == "layers.4.mlp,5"


@pytest.mark.parametrize(("text", "value"), [("0.05", 0.05), ("5%", 0.05), ("0", 0.0), ("150%", 1.5)])
def test_a_share_may_be_in_percent(text: str, value: float) -> None:
    assert read_share(text, "--x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["five", "", "%", "-1", "nan", "inf"])
def test_what_is_no_share_is_named(text: str) -> None:
    with pytest.raises(OptionError, match=f"--x: .*{text!r}"):
        read_share(text, "--x")


def test_a_drop_is_a_number_of_layers_or_a_part_of_them() -> None:
    assert read_drop("5", "--drop") == 5 and isinstance(read_drop("5", "--drop"), int)
    assert read_drop("1", "--drop") == 1 and isinstance(read_drop("1", "--drop"), int)
    assert read_drop("1.0", "--drop") == 1.0 and isinstance(read_drop("1.0", "--drop"), float)
    assert read_drop("40%", "--drop") == read_drop("0.4", "--drop") == 0.4
    with pytest.raises(OptionError, match=r"--drop.*'4\.5'"):
        read_drop("4.5", "--drop")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1000", 1000), ("1K", 1024), ("1.5M", 3 * 2**19), ("2G", 2**31), ("2GiB", 2**31), ("3 mb", 3 * 2**20), ("9b", 9)],
)
def test_bytes_may_have_a_unit(text: str, value: int) -> None:
    assert read_bytes(text, "--x") == value


@pytest.mark.parametrize("text", ["", "many", "M", "5X", "0", "-3", "1MM", "nan", "1e30"])
def test_what_are_no_bytes_is_named(text: str) -> None:
    with pytest.raises(OptionError, match=f"--x: .*{text!r}"):
        read_bytes(text, "--x")


def test_roads_are_read() -> None:
    assert read_roads("hoist, drop", "--roads") == ["hoist", "drop"]
    assert read_roads("hoist,", "--roads") == ["hoist", ""], "which there are, the planner says"


def test_the_options_are_arguments_of_make_plan() -> None:
    arguments = RoadOptions(roads="wide", hardware="h200", tp=8).arguments()
    assert arguments["roads"] == ["wide"] and arguments["tp"] == 8 and arguments["max_latency"] is None
    assert set(arguments) | set(GroupLimits().arguments()) <= set(inspect.signature(make_plan).parameters)
    assert RoadOptions().arguments()["roads"] is None
