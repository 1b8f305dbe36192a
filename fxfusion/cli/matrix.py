"""`fxfusion matrix MODEL_DIR`: how much each block depends on each one before it, and its heat map."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxfusion.cli.options import DropAttention, Unit, check_folder, read_layers
from fxfusion.cli.session import Known, Session, Work, measuring

UnitOption = Annotated[Unit, typer.Option("--unit", help="ffn: of the FFNs alone; block: of whole decoder layers.")]
_FORMATS = (".png", ".svg")
_SHOWN = 5  # pairs in the list of those that depend most


@measuring
def command(run: Session, unit: UnitOption = Unit.ffn, drop_attention: DropAttention = None) -> dict[str, Any]:
    """Measure how much what each block computes changes when a block before it is left out.

    FFNs that depend little on each other are cheap to fuse. Written as numbers and as a heat map (PNG and SVG).
    """
    check_folder(run.common.model_dir)
    run.require_text()
    dropped = [] if drop_attention is None else read_layers(drop_attention, "--drop-attention")
    folder = run.folder.matrix(unit.value, dropped)
    pictures = [folder / f"heat_map{suffix}" for suffix in _FORMATS]
    run.check_writes(*((picture, "heat map") for picture in pictures))
    if run.common.dry_run:
        known: Known = "begun" if folder.exists() else ""
        passes = 1 + len(run.graph_without_weights.blocks.layers)
        return run.plan_dry_run([Work(f"dependency matrix ({unit.value})", passes, known)], [folder, *pictures])

    from fxfusion.analysis.dependency import dependency_matrix
    from fxfusion.analysis.heat_map import heat_map

    matrix = dependency_matrix(
        run.model, run.batches, unit=unit.value, dropped_attention=dropped, resume=folder, progress=True
    )
    matrix.save(folder)
    for path in pictures:
        heat_map(matrix, path, overwrite=run.common.overwrite)
    _show(run, matrix)
    run.screen.line(f"\nwritten: {', '.join(map(str, [folder, *pictures]))}", "dim")
    found: dict[str, Any] = matrix.to_dict()
    return found


def _show(run: Session, matrix: Any) -> None:
    """The pairs that depend most and least."""
    values, layers = matrix.values.tolist(), matrix.layers
    pairs = [
        (values[row][column], layers[row], layers[column])
        for row in range(len(layers))
        for column in range(row + 1, len(layers))
    ]
    pairs.sort(key=lambda pair: pair[0])
    rows = [(f"{later} on {former}", f"{value:.5f}") for value, former, later in [*pairs[:_SHOWN], *pairs[-_SHOWN:]]]
    run.screen.table(("dependency of", "cosine distance"), rows)
