"""What all charts share: their style, and how a figure of matplotlib becomes a part of a page or a file.

One unit of a figure is one pixel of the page. A figure is drawn in the colours of the light page; on the page each of
them is the variable of the style sheet of that name, which is another colour in dark mode.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfusion.report.names import HUES, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

COLOURS = {  # light, dark
    "page": ("#f7f7f5", "#14171b"),
    "card": ("#ffffff", "#1c2026"),
    "text": ("#1d2127", "#e6e9ed"),
    "soft": ("#667080", "#98a2b0"),
    "line": ("#dfe2e6", "#333a44"),
    "plain": ("#aeb7c2", "#5a6573"),
    "edge": ("#5b6573", "#a3adba"),
    "bad": ("#c2410c", "#fb923c"),
    "good": ("#15803d", "#4ade80"),
    "link": ("#1d4ed8", "#8ab4ff"),
    "mark": ("#fff4cc", "#4a4012"),
    "h0": ("#2563eb", "#3b82f6"),  # h0 to h7: groups; more groups start again
    "h1": ("#0d9488", "#14a394"),
    "h2": ("#c026d3", "#c84fd8"),
    "h3": ("#b45309", "#c2751c"),
    "h4": ("#4d7c0f", "#6b9a24"),
    "h5": ("#dc2626", "#e05252"),
    "h6": ("#7c3aed", "#8b5cf6"),
    "h7": ("#0369a1", "#0e87c4"),
}

_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
_UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_MOST_TICKS = 20  # layer numbers on an axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A place on a chart that says something to a pointer; in percent of the chart."""

    left: float
    top: float
    title: str
    href: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart for the page. `svg` holds no text that is not escaped. `width`: in pixels, where there is room.

    `area`: where its data are: left, top, width, height in percent. `columns`: what a pointer is told, by parts of the
    area that are as wide as each other. `legend`: class of the style sheet and words.
    """

    svg: str
    width: int
    area: tuple[float, float, float, float]
    spots: tuple[Spot, ...] = ()
    columns: tuple[str, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


def ink(name: str) -> str:
    """A colour by its name, as figures are drawn in it."""
    return COLOURS[name][0]


def hue(group: int) -> str:
    """The colour of a group."""
    return ink(f"h{group % HUES}")


@contextmanager
def style() -> Iterator[None]:
    """Figures are made and written inside of this. Text is taken as it is: a `$` starts no formula."""
    from matplotlib import rc_context

    look: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.color": ink("text"),
        "text.parse_math": False,
        "axes.labelcolor": ink("soft"),
        "axes.edgecolor": ink("soft"),
        "axes.titlecolor": ink("soft"),
        "axes.titlesize": 11.5,
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "grid.color": ink("line"),
        "xtick.color": ink("soft"),
        "ytick.color": ink("soft"),
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "path.simplify": False,
        "svg.hashsalt": "fxfusion",  # with no date, the same data give the same file
    }
    with rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font measures text, but browsers have others for what it lacks
        yield


def new_figure(width: float, height: float, *, between: float = 4.0) -> Figure:
    """A figure of so many pixels; so many lie around each pair of axes that has no place of its own."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=between / 72, w_pad=4 / 72))
    return figure


def layer_ticks(axis: Any, layers: Sequence[int]) -> None:
    """Numbers of layers along an axis: all of a few, round ones of many."""
    step = next((size for size in (1, 2, 5, 10, 20, 50, 100) if len(layers) / size <= _MOST_TICKS), 200)
    shown = [(at, str(layer)) for at, layer in enumerate(layers) if layer % step == 0]
    axis.set_ticks([at for at, _ in shown], labels=[label for _, label in shown])


def plain_numbers(axis: Any, most: int = 6) -> None:
    """At most so many numbers along an axis, each written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    log = axis.get_scale() == "log"
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0), numticks=most) if log else MaxNLocator(most, steps=(1, 2, 5, 10))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a file of the kind that the suffix names: `.svg`, `.png` or `.pdf`."""
    figure.savefig(path, format=suffix[1:].lower(), dpi=150, metadata=_UNDATED.get(suffix.lower(), {}))


def inline(figure: Figure, name: str, title: str, text: str, *, over: Sequence[Any]) -> Chart:
    """A figure as part of a page, with a title and a text for those who do not see it.

    Args:
        name: no other chart of the page has it. over: the axes that hold the data.
    """
    from markupsafe import Markup, escape
    from matplotlib import rc_context
    from matplotlib.transforms import Bbox

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", facecolor="none", metadata=nothing)
    width, height = figure.bbox.size
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(title)}</title><desc>{escape(text)}</desc>'
    )
    drawn = re.sub(r"^.*?<svg .*?</style>\s*</defs>", lambda _: head, stream.getvalue(), count=1, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = _numbered(drawn, name)  # ids are digests of places, which layouts give to the last bit but one
    drawn = re.sub(r"font-family: [^;\"]*;? ?", "", drawn)
    drawn = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", drawn)  # how older versions name it
    drawn = re.sub(r"(fill|stroke): (#\w{6})", lambda found: f"{found[1]}: {_VARIABLES.get(found[2], found[2])}", drawn)
    return Chart(svg=Markup(drawn), width=round(width), area=_percent(figure, Bbox.union([a.bbox for a in over])))


def _numbered(svg: str, name: str) -> str:
    """The same with ids that only depend on their order."""
    known: dict[str, str] = {}
    return re.sub(
        r'(id="|url\(#|href="#)([a-z]+[0-9a-f]{10})\b',
        lambda found: found[1] + known.setdefault(found[2], f"{name}-{len(known)}"),
        svg,
    )


def with_spots(chart: Chart, figure: Figure, axes: Any, found: Sequence[tuple[float, float, str, str]]) -> Chart:
    """The chart with a spot for each of `found`: x, y, title, address."""
    width, height = figure.bbox.size
    places = axes.transData.transform([(x, y) for x, y, _, _ in found])
    spots = (
        Spot(left=round(100 * x / width, 2), top=round(100 - 100 * y / height, 2), title=title, href=href)
        for (x, y), (_, _, title, href) in zip(places, found, strict=True)
    )
    return replace(chart, spots=tuple(spots))


def _percent(figure: Figure, box: Bbox) -> tuple[float, float, float, float]:
    width, height = figure.bbox.size
    found = (box.x0 / width, 1 - box.y1 / height, box.width / width, box.height / height)
    left, top, across, down = (round(100 * share, 3) for share in found)
    return left, top, across, down
