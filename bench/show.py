"""What all benchmarks show their findings with: tables, plots and sections of pages. Plots need matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from bench.record import Interval, Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
Row = Mapping[str, Any]
Shown = str | Callable[[Any], object]
Columns = Mapping[str, Shown] | Sequence[tuple[str, Shown]]
Point = tuple[float, Interval | float]
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))

# --- tables -------------------------------------------------------------------------------------------


def table(rows: Iterable[Sequence[object]], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Text that lines up; cells are shown as they are given."""
    cells = [tuple("" if cell is None else cell for cell in row) for row in rows]
    return tabulate(cells, headers, tablefmt="github" if markdown else "simple", disable_numparse=True)


def columns(rows: Iterable[Any], of: Columns) -> str:
    """A Markdown table by columns: heading, and a function of the row or the place of its value, such as `a.b`.

    An estimate is shown with its interval, what is None as a dash.
    """
    heads = list(of.items() if isinstance(of, Mapping) else of)
    return table(([_shown(row, what) for _, what in heads] for row in rows), [head for head, _ in heads], markdown=True)


def _shown(row: Any, what: Shown) -> object:
    if not isinstance(what, str):
        return what(row)
    found: Any = row
    for step in what.split("."):
        found = None if found is None else found[step]
    return "-" if found is None else cell(found) if isinstance(found, Mapping) else found


def times(found: Interval) -> str:
    """A ratio, such as "1.24x [1.20, 1.30]"."""
    return f"{found.value:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def seconds(value: float) -> str:
    """A duration with three digits, such as "12.3 ms"."""
    size, unit = next((pair for pair in _UNITS if abs(value) >= pair[0]), _UNITS[-1])
    return f"{value / size:.3g} {unit}"


def bytes_(value: Any) -> str:
    """A size with three digits, such as "1.5 GiB"."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def ratio_table(found: Sequence[Measurement], heads: Sequence[tuple[str, str]], *, markdown: bool = False) -> str:
    """One row for each measurement: its place, then the ratios of `heads` (name of the ratio, heading)."""
    places = list(dict.fromkeys(name for one in found for name in one.place))
    rows = [
        [one.place.get(name) for name in places]
        + [times(one.ratios[name]) if name in one.ratios else None for name, _ in heads]
        for one in found
    ]
    return table(rows, [*places, *(heading for _, heading in heads)], markdown=markdown)


def by_kind(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """What was measured of chains, of windows and of whole models."""
    found: dict[str, list[Measurement]] = {"chains": [], "models": [], "windows": []}
    for one in measurements:
        found["chains" if "members" in one.place else "windows" if "windows" in one.place else "models"].append(one)
    return found


# --- cells of docs/results.md -------------------------------------------------------------------------


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def value(row: Row) -> float:
    """Loss above the intact model [nats per token]."""
    return float(row["loss_increase"]["value"])


def cell(estimate: Mapping[str, float | None]) -> str:
    shown = ["-" if x is None else f"{x:.2f}" if abs(x) >= 10 else f"{x:.3f}" for x in _ends(estimate)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def fine_cell(estimate: Mapping[str, float | None]) -> str:
    """For differences of plans that are nearly alike."""
    shown = ["-" if x is None else f"{x:+.4f}" for x in _ends(estimate)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _ends(estimate: Mapping[str, float | None]) -> list[float | None]:
    return [estimate[name] for name in ("value", "low", "high")]


def groups_of(row: Row) -> str:
    return "; ".join(span(group) for group in row["groups"]) or "-"


def span(layers: Sequence[int]) -> str:
    """`4-8` for neighbours, else all of them."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return " ".join(map(str, layers)) or "-"


# --- plots and pages ----------------------------------------------------------------------------------


def new_figure(*, x: str, y: str, title: str = "", size: tuple[float, float] = (7.0, 4.2)) -> tuple[Figure, Any]:
    """A figure with one pair of axes, in the style that all share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    return figure, axes


def draw_lines(axes: Any, series: Mapping[str, Sequence[Point]]) -> None:
    """One line for each of `series`, with error bars where a value is an interval."""
    for name, points in series.items():
        ends = [found if isinstance(found, Interval) else Interval.exact(found) for _, found in points]
        down, up = [max(0.0, one.value - one.low) for one in ends], [max(0.0, one.high - one.value) for one in ends]
        at, middle = [x for x, _ in points], [one.value for one in ends]
        axes.errorbar(at, middle, (down, up), fmt="o-", ms=3, capsize=2, label=name)


def save(figure: Figure, path: Path) -> Path:
    """The same plot is the same file: its ids are drawn by name, not by chance."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "fxfusion"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def write_section(folder: Path, name: str, words: Mapping[str, Any]) -> Path:
    """Make the section of results.md in the folder from the page of that name."""
    text = render(f"{name.replace(' ', '_')}.md.j2", words)
    return put_section(folder / "results.md", name, text)


def render(page: str, words: Mapping[str, Any]) -> str:
    """A page of bench/pages. Its sentences call functions of `words` and of this module, and read the findings."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "pages")
    made = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return made.get_template(page).render({**globals(), **words}).strip() + "\n"


def put_section(page: Path, name: str, text: str) -> Path:
    """Replace a section of the page, or add it at the end; what other benchmarks wrote stays."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->\n"
    before = page.read_text("utf-8") if page.exists() else ""
    block = begin + text.strip() + end
    if begin in before and end in before:
        head, _, rest = before.partition(begin)
        content = head + block + rest.partition(end)[2]
    else:
        content = f"{before.rstrip()}\n\n{block}".lstrip()
    page.write_text(content, encoding="utf-8")
    return page
