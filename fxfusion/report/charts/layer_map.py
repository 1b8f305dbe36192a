"""All layers from left to right: attention, FFNs, groups, measures. Paths: one unit per layer across, percent down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxfusion.report.charts.scale import Scale, Tick, layer_ticks, number
from fxfusion.report.html import HUES
from fxfusion.report.results import Interval, Layer

_LAYER_PIXELS = 7  # least width of a layer on the map, in the style sheet too
_PHONE_PIXELS = 280  # of the map on the narrowest screen
_GROUP_PIXELS = 50  # what the words "group 1" need


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One number per layer. `line`, `whiskers`: paths; `dots`: path of points without length; `zero`: its height."""

    label: str
    low: str
    high: str
    zero: float | None
    line: str
    dots: str
    whiskers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """A group under its layers; `left` and `width` in percent."""

    left: float
    width: float
    hue: int
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """`kept`, `dropped`: paths of the attention boxes. `bars`: FFNs by colour (None: in no group)."""

    count: int
    kept: str
    dropped: str
    bars: tuple[tuple[int | None, str], ...]
    widest: int
    brackets: tuple[Bracket, ...]
    curves: tuple[Curve, ...]
    ticks: tuple[Tick, ...]


def layer_map(layers: Sequence[Layer], score_method: str) -> LayerMap:
    """Attention, FFNs and measures of all layers, from left to right."""
    widest = max(layer.width for layer in layers)
    bars: dict[int | None, str] = {}
    for at, layer in enumerate(layers):
        if layer.width:
            hue = None if layer.group is None else layer.group % HUES
            height = round(100.0 * layer.width / widest, 2)
            bars[hue] = bars.get(hue, "") + f"M{at}.08 100v-{height}h.84v{height}z"
    method = f" ({score_method})" if score_method else ""
    curves = [
        _curve(f"attention score{method}", [layer.score for layer in layers], joined=False, from_zero=True),
        _curve("1 − cos(X, f(X)): how far the layer turns the stream", [_distance(layer.cosine) for layer in layers]),
        _curve("‖h‖ / ‖X‖: size of what the layer adds, against the stream", [_exact(layer.ratio) for layer in layers]),
    ]
    return LayerMap(
        count=len(layers),
        kept=_boxes(layers, "kept"),
        dropped=_boxes(layers, "dropped"),
        bars=tuple(bars.items()),
        widest=widest,
        brackets=tuple(_brackets(layers)),
        curves=tuple(curve for curve in curves if curve is not None),
        ticks=layer_ticks([layer.number for layer in layers]),
    )


def _boxes(layers: Sequence[Layer], mixer: str) -> str:
    return "".join(f"M{at}.14 12h.72v76h-.72z" for at, layer in enumerate(layers) if layer.mixer == mixer)


def _brackets(layers: Sequence[Layer]) -> Iterator[Bracket]:
    places: dict[int, list[int]] = {}
    for at, layer in enumerate(layers):
        if layer.group is not None:
            places.setdefault(layer.group, []).append(at)
    count = len(layers)
    for group, cells in sorted(places.items()):
        size = max(cells) - min(cells) + 1
        pixels = size * max(_LAYER_PIXELS, _PHONE_PIXELS / count)
        label = f"group {group}" if pixels >= _GROUP_PIXELS else str(group)
        yield Bracket(
            left=round(100.0 * min(cells) / count, 3),
            width=round(100.0 * size / count, 3),
            hue=group % HUES,
            label=label,
        )


def _exact(value: float | None) -> Interval | None:
    return None if value is None else Interval(value)


def _distance(cosine: float | None) -> Interval | None:
    return None if cosine is None else Interval(max(0.0, 1.0 - cosine))


def _curve(label: str, found: Sequence[Interval | None], joined: bool = True, from_zero: bool = False) -> Curve | None:
    """`from_zero`: the axis reaches zero, where a layer is worth nothing."""
    values = [estimate.value if estimate else None for estimate in found]
    ends = [end for estimate in found if estimate for end in (estimate.low, estimate.high) if end is not None]
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    scale = Scale.around([*finite, *ends, *([0.0] if from_zero else [])], margin=0)
    points = [(at + 0.5, 100 - scale.share(value)) for at, value in enumerate(values) if value is not None]
    whiskers = ""
    for at, estimate in enumerate(found):
        if estimate and estimate.low is not None and estimate.high is not None:
            low, high = 100 - scale.share(estimate.low), 100 - scale.share(estimate.high)
            whiskers += f"M{at}.5 {low:g}V{high:g}"
    return Curve(
        label=label + (", log scale" if scale.log else ""),
        low=number(scale.low, 2),
        high=number(scale.high, 2),
        zero=100 - scale.share(0.0) if not scale.log and scale.low <= 0 <= scale.high else None,
        line="M" + "L".join(f"{x} {y:g}" for x, y in points) if joined else "",
        dots="".join(f"M{x} {y:g}h0" for x, y in points),
        whiskers=whiskers,
    )
