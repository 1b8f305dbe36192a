"""All layers from left to right: attention, FFNs, groups, and what was measured of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fxfusion.report.charts.figure import Chart, hue, ink, inline, layer_ticks, new_figure, plain_numbers, style
from fxfusion.report.model import Block, GraphReport
from fxfusion.report.names import number, tail
from fxfusion.report.results import Interval, Layer
from fxfusion.report.results_tables import layer_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOG_FROM = 20.0  # ratio of largest to smallest from which on a linear axis hides the small ones
_LAYER, _LEAST, _MOST = 48, 560, 1000  # pixels: of a layer, and of the whole map
_SIDES = 80  # pixels beside the layers
_TITLE = 36  # pixels of the words above each row of the map, and around it
_GROUP = 50  # pixels that the words "group 1" need


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A layer of the map: its token mixer, its FFN (`width` 0: none), and what a pointer on it is told.

    `mixer`: kept, dropped, moved before the FFNs of a group, or none. `refused`: neither an FFN nor a mixer.
    """

    label: str
    mixer: Literal["kept", "dropped", "moved", "none"] = "none"
    width: int = 0
    group: int | None = None
    refused: bool = False
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One number per layer. `from_zero`: the axis reaches zero, where a layer is worth nothing."""

    label: str
    values: Sequence[Interval | None]
    joined: bool = True
    from_zero: bool = False


def map_of_layers(layers: Sequence[Layer], score_method: str) -> Chart:
    """What is known of all layers of a model."""
    columns = [
        Column(label=str(one.number), mixer=one.mixer, width=one.width, group=one.group, title=layer_title(one))
        for one in layers
    ]
    return _inline(columns, curves_of(layers, score_method), "map")


def curves_of(layers: Sequence[Layer], score_method: str) -> list[Curve]:
    """What was measured of the layers."""
    method = f" ({score_method})" if score_method else ""
    turns = [None if one.cosine is None else Interval(max(0.0, 1.0 - one.cosine)) for one in layers]
    sizes = [None if one.ratio is None else Interval(one.ratio) for one in layers]
    scores = [layer.score for layer in layers]
    found = [
        Curve(
            label=f"attention score{method}: what its attention is worth", values=scores, joined=False, from_zero=True
        ),
        Curve(label="1 − cos(X, f(X)): how far the layer turns the residual stream X", values=turns),
        Curve(label="‖h‖ / ‖X‖: size of what the layer adds, against the residual stream X", values=sizes),
    ]
    return [curve for curve in found if any(one and one.value is not None for one in curve.values)]


def map_of_graph(graph: GraphReport, name: str) -> Chart:
    """The residual blocks of a captured graph."""
    return _inline(columns_of(graph), (), name)


def columns_of(graph: GraphReport) -> list[Column]:
    """A block each; a mixer and what follows it in the same layer share one."""
    reasons = {refusal.layer or refusal.node: refusal for refusal in graph.refusals}
    columns: list[Column] = []
    for block in graph.blocks_before:
        label, words = tail(block.name).split(".")[0], [block.name, _what(block)]
        refusal = reasons.get(block.name) if block.group is None else None
        if refusal is not None:
            words.append(f"not fused ({refusal.code.value}): {refusal.message}")
            words += [refusal.source] if refusal.source else []
        title = "\n".join(words)
        if block.kind == "mixer":
            columns.append(Column(label=label, mixer="kept" if block.window is None else "moved", title=title))
            continue
        last = columns[-1] if columns else None
        found = Column(label=label, width=block.width, group=block.group, refused=block.kind == "refused", title=title)
        if last is not None and last.label == label and not (last.width or last.refused):
            columns[-1] = replace(found, mixer=last.mixer, title=f"{last.title}\n{title}")
        else:
            columns.append(found)
    return columns


def _what(block: Block) -> str:
    if block.kind == "mixer":
        moved = "" if block.window is None else f", moved before the FFNs of its window, group {block.window}"
        return f"token mixer: {block.detail}{moved}"
    if block.kind == "refused":
        return block.detail
    return f"FFN, intermediate width {block.width:,}" + ("" if block.group is None else f", fused, group {block.group}")


def _inline(columns: Sequence[Column], curves: Sequence[Curve], name: str) -> Chart:
    with style():
        figure = draw(columns, curves)
        text = "Which layers have attention, how wide their FFNs are, and which of these become one."
        chart = inline(figure, name, "Map of the layers", text, over=figure.axes)
    return replace(chart, columns=tuple(column.title for column in columns), legend=legend_of(columns))


def legend_of(columns: Sequence[Column]) -> tuple[tuple[str, str], ...]:
    """What is on the map: class of the style sheet, and words."""
    ffns = [column for column in columns if column.width and not column.refused]
    fused = any(column.group is not None for column in ffns)
    words = {
        "kept": ("attention kept", any(column.mixer == "kept" for column in columns)),
        "moved": ("attention moved before the FFNs of its group", any(column.mixer == "moved" for column in columns)),
        "dropped": ("attention dropped", any(column.mixer == "dropped" for column in columns)),
        "plain": ("FFN in no group" if fused else "FFN", any(column.group is None for column in ffns)),
        "hue0": ("FFN of a group (one colour per group)", fused),
        "refused": ("neither attention nor an FFN that is understood", any(column.refused for column in columns)),
    }
    return tuple((name, said) for name, (said, there) in words.items() if there)


def draw(columns: Sequence[Column], curves: Sequence[Curve] = ()) -> Figure:
    """One pair of axes for the mixers, one for the FFNs, one for each curve."""
    heights = [16, 76, *(56 for _ in curves)]
    width = min(_MOST, max(_LEAST, _SIDES + _LAYER * len(columns)))
    figure = new_figure(width, sum(heights) + _TITLE * len(heights) + 24, between=7)
    rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes in rows:
        axes.spines[:].set_visible(False)
    _mixers(rows[0], columns)
    _ffns(rows[1], columns, (width - _SIDES) / len(columns))
    for axes, curve in zip(rows[2:], curves, strict=True):
        _curve(axes, curve)
    rows[-1].set_xlim(-0.5, len(columns) - 0.5)
    rows[-1].set_xlabel("layer")
    if all(column.label.isdecimal() for column in columns):
        layer_ticks(rows[-1].xaxis, [int(column.label) for column in columns])
    else:
        rows[-1].xaxis.set_ticks([])
    return figure


def _mixers(axes: Any, columns: Sequence[Column]) -> None:
    axes.set_title("attention, or another token mixer")
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    kept, moved, dropped = (
        [(at - 0.36, 0.05, 0.72, 0.9) for at, column in enumerate(columns) if column.mixer == mixer]
        for mixer in ("kept", "moved", "dropped")
    )
    _boxes(axes, kept, facecolor=ink("edge"))
    _boxes(axes, moved, facecolor=ink("plain"), edgecolor=ink("edge"), linewidth=1.2)
    _boxes(axes, dropped, facecolor="none", edgecolor=ink("edge"), linewidth=1.2, linestyle=(0, (3, 2)))


def _ffns(axes: Any, columns: Sequence[Column], pixels: float) -> None:
    """`pixels`: width of a layer."""
    widest = max((column.width for column in columns), default=0) or 1
    axes.set_title("FFN: its width, and the groups that become one FFN each")
    axes.set_yticks([0, widest], labels=["0", number(widest, 6)])
    axes.set_ylim(-0.32 * widest, widest)
    colours: dict[str, list[tuple[float, float, float, float]]] = {}
    places: dict[int, list[int]] = {}
    for at, column in enumerate(columns):
        colour = ink("plain") if column.group is None else hue(column.group)
        if column.width and not column.refused:
            colours.setdefault(colour, []).append((at - 0.42, 0, 0.84, column.width))
        if column.group is not None:
            places.setdefault(column.group, []).append(at)
    for colour, boxes in colours.items():
        _boxes(axes, boxes, facecolor=colour)
    refused = [(at - 0.42, 0, 0.84, 0.3 * widest) for at, column in enumerate(columns) if column.refused]
    _boxes(axes, refused, facecolor="none", edgecolor=ink("bad"), linewidth=1.2, linestyle=(0, (2, 2)))
    for group, cells in sorted(places.items()):
        first, last = min(cells) - 0.42, max(cells) + 0.42
        axes.plot([first, last], [-0.05 * widest] * 2, color=hue(group), linewidth=3, solid_capstyle="butt")
        label = f"group {group}" if (last - first) * pixels >= _GROUP else str(group)
        axes.text((first + last) / 2, -0.1 * widest, label, ha="center", va="top", fontsize=10)


def _boxes(axes: Any, corners: Sequence[tuple[float, float, float, float]], **look: Any) -> None:
    """Boxes of one look as one path: left, bottom, width, height."""
    import numpy
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if corners:
        boxes = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in corners]
        path = Path.make_compound_path_from_polys(numpy.array(boxes))
        axes.add_patch(PathPatch(path, **{"linewidth": 0, **look}))


def _curve(axes: Any, curve: Curve) -> None:
    known = [(at, one, one.value) for at, one in enumerate(curve.values) if one and one.value is not None]
    values = [value for _, _, value in known]
    log = not curve.from_zero and min(values) > 0 and max(values) / min(values) > _LOG_FROM
    axes.set_title(curve.label + (", log scale" if log else ""))
    axes.set_yscale("log" if log else "linear")
    lines: list[tuple[float, float]] = []
    for at, one, _ in known:
        if one.low is not None and one.high is not None:
            lines += [(at, one.low), (at, one.high), (float("nan"), float("nan"))]
    axes.plot([x for x, _ in lines], [y for _, y in lines], color=ink("soft"), linewidth=1.2)
    between = "-" if curve.joined else "none"
    axes.plot([at for at, _, _ in known], values, color=ink("h0"), marker="o", markersize=3.5, linestyle=between)
    if curve.from_zero or min(values) <= 0 <= max(values):
        axes.axhline(0, color=ink("soft"), linewidth=1.0)
    axes.grid(axis="y")
    plain_numbers(axes.yaxis, 3)
