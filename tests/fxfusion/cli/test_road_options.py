from __future__ import annotations

import pytest

from fxfusion.cli.road_options import RoadChoice, read_roads
from fxfusion.errors import OptionError
from fxfusion.planning.roads.choose import RoadArguments


def test_roads_are_read() -> None:
    assert read_roads("hoist, drop") == ["hoist", "drop"]
    for wrong in ("", "hoist,", "up"):
        with pytest.raises(OptionError, match="--roads: expected some of drop, hoist, wide"):
            read_roads(wrong)


def test_the_options_are_arguments_of_make_plan() -> None:
    arguments = RoadChoice(roads="wide", hardware="h200", tp=8).arguments()
    assert arguments["roads"] == ["wide"] and arguments["tp"] == 8 and arguments["max_latency"] is None
    assert set(arguments) | {"after_refit"} == set(RoadArguments.__annotations__)
    assert RoadChoice().arguments()["roads"] is None
