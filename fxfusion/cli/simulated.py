"""What `fxfusion simulate` prints: simulations side by side, placements, gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fxfusion.cli.screen import Screen

if TYPE_CHECKING:
    from fxfusion.cost import Simulation
    from fxfusion.cost.gain import Gains
    from fxfusion.cost.hardware import Hardware
    from fxfusion.cost.placement import Placements


def show(screen: Screen, found: Sequence[tuple[str, Simulation]]) -> None:
    """Simulations side by side."""
    first = found[0][1]
    work = first.work
    what = "prompts of" if work.phase == "prefill" else "cached tokens of each:"
    device = f"{work.tp} x {first.hardware.name}"
    screen.line(f"{first.name} on {device}, {work.precision}, batch {work.batch}, {what} {work.context}")
    columns = [_rows(one) for _, one in found]
    screen.table(("", *(name for name, _ in found)), [(name, *(each[name] for each in columns)) for name in columns[0]])
    for window in found[-1][1].to_dict()["windows"]:
        screen.line(_window_text(window))
    if len(found) > 1:
        screen.line(f"{first.latency_ms / found[-1][1].latency_ms:.3f}x as fast")


def _window_text(window: Mapping[str, Any]) -> str:
    """`window 4-5 (hoist): 3 sublayers instead of 4, 3 all-reduces instead of 4`"""
    layers = window["layers"]
    shown = f"window {layers[0]}-{layers[-1]} ({window['mixers']}): "
    shown += f"{window['sublayers']} sublayers instead of {window['sublayers_before']}"
    if window["all_reduces"]:
        shown += f", {window['all_reduces']} all-reduces instead of {window['all_reduces_before']}"
    return shown


def _rows(one: Simulation) -> dict[str, str]:
    rows = {
        "latency [ms]": f"{one.latency_ms:.3f}",
        **{f"  {name.replace('_', '-')}": f"{value:.3f}" for name, value in one.to_dict()["breakdown_ms"].items()},
        "tokens per second": f"{one.tokens_per_second:.2f}",
        "kernels, all-reduces": f"{one.kernels}, {one.all_reduces}",
        "attentions, FFNs in a row": f"{one.attentions}, {one.ffns}",
        "memory of a device [GB]": f"{one.bytes.total / 1e9:.2f}" + ("" if one.fits_in_memory else " (does not fit)"),
    }
    if one.cost_per_million_tokens is not None:
        rows["cost of a million tokens"] = f"{one.cost_per_million_tokens:.3f}"
    return rows


def show_placements(screen: Screen, found: Placements) -> None:
    """A row for each alternative."""
    rows = []
    for one in found.rows:
        simulation, cost = one.simulation, one.simulation.cost_per_million_tokens
        rows.append(
            (
                f"{simulation.work.tp}{' *' if one is found.quickest else ''}",
                one.cut,
                _sizes(one.groups),
                f"{simulation.latency_ms:.3f}",
                simulation.all_reduces,
                f"{simulation.bytes.total / 1e9:.1f}{'' if one.fits else ' !'}",
                f"{one.making / 1e9:.1f}{'' if one.can_fuse else ' !'}",
                "" if cost is None else f"{cost:.2f}",
            )
        )
    heads = ("tp", "cut", "groups of", "ms", "all-reduces", "GB", "GB fusing", "cost of 1M")
    screen.table(heads, rows)
    screen.line("! more than the usable memory of a device. * the quickest that fits, fusing included", "dim")
    for tp, why in found.refused.items():
        screen.line(f"tp {tp}: {why}", "dim")


def _sizes(groups: Sequence[int]) -> str:
    """`8, 12, 3 x 2`"""
    parts: list[tuple[int, int]] = []
    for size in groups:
        if parts and parts[-1][1] == size:
            parts[-1] = (parts[-1][0] + 1, size)
        else:
            parts.append((1, size))
    return ", ".join(str(size) if count == 1 else f"{count} x {size}" for count, size in parts)


def show_gains(screen: Screen, found: Gains) -> None:
    """Batches across, sizes and scales down."""
    batches = sorted({point.batch for point in found.points})
    settings = dict.fromkeys((point.scale, point.hidden, point.tp) for point in found.points)
    by_setting = {(point.scale, point.tp, point.batch): point for point in found.points}
    rows = [
        (f"{hidden}, tp {tp}", *(f"{by_setting[scale, tp, batch].gain:.3f}" for batch in batches))
        for scale, hidden, tp in settings
    ]
    screen.line(f"latency before / after fusing, {found.name}, {found.hardware}, {found.precision}")
    screen.table(("hidden size", *(f"batch {batch}" for batch in batches)), rows)
    for why in found.refused:
        screen.line(why, "dim")


def show_hardware(screen: Screen, found: Hardware) -> None:
    """What was measured."""
    rows = [("memory bandwidth [GB/s]", f"{found.bandwidth / 1e9:.1f}")]
    rows += [(f"GEMM, {kind} [GFLOP/s]", f"{found.rate(kind) / 1e9:.1f}") for kind in found.flops]
    rows += [
        ("a small kernel [us]", f"{found.kernel_latency * 1e6:.2f}"),
        ("a small GEMM besides [us]", f"{found.gemm_floor * 1e6:.2f}"),
    ]
    screen.table((found.name, ""), rows)
