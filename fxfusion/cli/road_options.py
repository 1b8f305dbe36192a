"""Options of the commands that choose between roads: drop attention, hoist it, or make it one wide block."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Annotated, Any, Literal, cast, get_args

import typer

from fxfusion.errors import OptionError

Road = Literal["drop", "hoist", "wide"]


class Preset(str, Enum):
    """Rules instead of a budget."""

    paper = "paper"
    automatic = "automatic"


Automatic = Annotated[
    bool,
    typer.Option(
        "--automatic", help="Drop and hoist, after refit, within 1% of the perplexity, the least latency on one H100."
    ),
]
Roads = Annotated[
    str | None,
    typer.Option(
        "--roads",
        metavar="ROADS",
        help="How FFNs may become neighbours: some of drop,hoist,wide. Works on models with all attention intact.",
        show_default=False,
    ),
]
AfterRefit = Annotated[
    bool | None,
    typer.Option("--after-refit/--as-is", help="With --roads: judge each plan by its loss after `fxfusion refit`."),
]
MaxWindow = Annotated[
    int | None, typer.Option(min=2, help="With --roads: layers that become one at most.", show_default="6")
]
Hardware = Annotated[
    str | None,
    typer.Option("--hardware", help="What latency is predicted for: h100, h200, ... or a file.", show_default=False),
]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Devices that share every matrix, for the latency.")]
Precision = Annotated[str, typer.Option("--precision", help="Of the weights, for the latency: bf16, fp8, ...")]
MaxLatency = Annotated[
    float | None, typer.Option(metavar="MS", help="Predicted latency of one token at most.", show_default=False)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoadChoice:
    """Which roads, and what latency is predicted for."""

    roads: Roads = None
    max_window: MaxWindow = None
    hardware: Hardware = None
    tp: Tp = 1
    precision: Precision = "bf16"
    max_latency: MaxLatency = None

    def arguments(self) -> dict[str, Any]:
        """As `make_plan` takes them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return given | {"roads": None if self.roads is None else read_roads(self.roads)}


def read_roads(text: str) -> list[Road]:
    """`"hoist,wide"` -> `["hoist", "wide"]`."""
    known = get_args(Road)
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if part not in known]
    if wrong:
        raise OptionError(f"--roads: expected some of {', '.join(known)}, such as hoist,wide; got {wrong[0]!r}")
    return cast(list[Road], parts)
